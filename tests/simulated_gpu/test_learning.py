"""What runs learn of a machine's speeds is what the simulated card, bus and disk really do."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.models.qwen_image.family import QWEN_IMAGE
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.draft import least_bytes, least_ram_bytes, most_bytes, most_ram_bytes
from qwenimage_lowvram.engine.planning.forecast import TYPICAL, Speeds
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.request import Limits, SamplingRequest
from qwenimage_lowvram.engine.planning.stages import Stage
from qwenimage_lowvram.engine.reports.memory_report import MemoryReport
from qwenimage_lowvram.engine.runs import card_benchmark, machine_speeds, sampling_run
from qwenimage_lowvram.engine.runs.card_benchmark import Bench, benchmark_model
from qwenimage_lowvram.engine.runs.known_speeds import KnownSpeeds
from qwenimage_lowvram.engine.runs.sampling_run import SamplingRun
from qwenimage_lowvram.engine.runs.spilling import spill_warning
from qwenimage_lowvram.engine.runs.surroundings import Alone
from qwenimage_lowvram.engine.runs.timeline import Timeline

from .costs import Rates
from .device import SimulatedGPU
from .rig import IMAGE, PROMPT_TOKENS, Rig, finish, known
from .tiny_models import LAYERS, TinyModels

pytestmark = pytest.mark.slow
TIMES = (1.0, 0.7, 0.4)
REQUEST = SamplingRequest(
    width=IMAGE[2] * 16, height=IMAGE[1] * 16, branches=1, prompt_tokens=PROMPT_TOKENS[0], timesteps=len(TIMES)
)
# a tiny model computes less with each of its bytes; and a machine that is as small as it is, so that steps take seconds
FIRST = Speeds(TYPICAL.flops / 5e7, TYPICAL.bus_bytes / 1e5, TYPICAL.disk_bytes / 1e5)


CALLS = {"least": (least_bytes, least_ram_bytes), "most": (most_bytes, most_ram_bytes)}
Room = tuple[str, str]  # on the card and in RAM


def sample(
    rig: Rig,
    model: QwenImageTransformer,
    speeds: KnownSpeeds,
    room: Room,
    *,
    around: Alone | None = None,
    timeline: Timeline | None = None,
) -> MemoryReport:
    """One run, whose sampler waits for nothing between its steps."""
    vram, ram = (CALLS[name][i](model.footprint, REQUEST) for i, name in enumerate(room))
    plan = plan_memory(model.footprint, REQUEST, Limits(vram, ram), speeds.get())
    run = SamplingRun(
        model,
        plan,
        steps=len(TIMES),
        speeds=speeds,
        timeline=timeline or Timeline(),
        surroundings=around or Alone(),
    )
    branches = [rig.branches(timestep) for timestep in TIMES]
    finished = False
    try:
        run.load()
        run.begin(TIMES)
        for branch in branches:
            run.forward(branch)
        finished = True
    finally:
        report = run.end(finished=finished)
    return report


def step_seconds(models: TinyModels, rates: Rates) -> tuple[float, float]:
    """Of a step in which nothing is copied, by the host's time, which waits for the card before and after it; and the
    operations of it."""
    with SimulatedGPU("late", costs=replace(rates, bus_bytes=float("inf"), disk_bytes=float("inf"))) as gpu:
        rig = Rig(models, gpu)
        model = rig.transformer("bf16")
        model.load(range(LAYERS))
        model.modulation.announce(TIMES)
        branches = rig.branches(TIMES[0])
        with model.session(slots=1) as session:
            gpu.accelerator.synchronize()
            begun = time.perf_counter()
            session.forward(branches)
            gpu.accelerator.synchronize()
            seconds = time.perf_counter() - begun
        finish(model)
        return seconds, model.footprint.step_flops(REQUEST)


@pytest.mark.parametrize(
    ("flops", "bus", "disk", "rooms"),
    [
        (1 / 32, 1, 1, (("least", "most"), ("most", "most"))),  # bound by compute
        (50, 60, 60, (("least", "most"), ("least", "least"))),
        (1, 1 / 10, 1, (("least", "most"), ("least", "least"))),  # by the bus
        (1, 2, 1 / 40, (("least", "least"), ("least", "most"))),  # by the disk
    ],
)
def test_in_three_runs_speeds_are_the_true_ones_and_stay_so(
    flops: float, bus: float, disk: float, rooms: Sequence[Room], tiny_models: TinyModels
) -> None:
    """Factors of what is thought at first; the last run is one of another plan."""
    rates = Rates(flops=FIRST.flops * flops, bus_bytes=FIRST.bus_bytes * bus, disk_bytes=FIRST.disk_bytes * disk)
    seconds, operations = step_seconds(tiny_models, rates)
    truth = (operations / seconds, rates.bus_bytes, rates.disk_bytes)
    with SimulatedGPU("late", costs=rates) as gpu:
        rig = Rig(tiny_models, gpu)
        model, speeds = rig.transformer("bf16"), known(rig, FIRST)
        for number, room in enumerate((*[rooms[0]] * 3, rooms[1])):
            sample(rig, model, speeds, room)
            model.store.set_held(())
            if number > 1:
                assert astuple(speeds.get())[:3] == pytest.approx(truth, rel=0.1)
        finish(model)


def test_a_new_machine_is_measured_by_what_its_card_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host takes half as long to issue a product as the card to compute it."""
    tokens, width, hidden = 16, 32, 64
    monkeypatch.setattr(machine_speeds, "MLP_SHAPE", (tokens, width, hidden))
    monkeypatch.setattr(machine_speeds, "PIECE_BYTES", 2**16)
    product_seconds = 0.02
    rates = Rates(2.0 * tokens * width * hidden / product_seconds, bus_bytes=5e6, issue_seconds=product_seconds / 2)
    with SimulatedGPU("late", costs=rates) as gpu:
        hardware = gpu.hardware()
        assert machine_speeds.measure_flops(hardware, torch.bfloat16) == pytest.approx(rates.flops, rel=0.01)
        assert machine_speeds.measure_bus(hardware) == pytest.approx(rates.bus_bytes, rel=0.01)


def test_a_benchmark_tells_what_the_card_and_the_bus_do(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that the host issues in no time; nothing is brought while a block that is measured computes."""
    monkeypatch.setattr(machine_speeds, "MLP_SHAPE", (16, 32, 64))
    monkeypatch.setattr(machine_speeds, "PIECE_BYTES", 2**16)
    monkeypatch.setattr(machine_speeds, "SECONDS_EACH", 1e-3)
    monkeypatch.setattr(card_benchmark, "measure_disk", lambda file: 1e9)
    monkeypatch.setattr(card_benchmark, "measure_memory", lambda hardware: 1e12)
    rates = Rates(flops=1e8, bus_bytes=1e6)
    with SimulatedGPU("late", costs=rates) as gpu:
        rig = Rig(tiny_models, gpu)
        model = rig.transformer("bf16")
        monkeypatch.setattr(Alone, "device_bytes", lambda *_: 1 << 30)
        report = benchmark_model(model, QWEN_IMAGE.from_prompts, Bench(Alone()), width=64, height=48)
        finish(model)
    assert report.run is not None
    (block,) = report.blocks
    assert report.rates.flops == pytest.approx(rates.flops, rel=0.05)
    assert report.rates.bus_bytes == pytest.approx(rates.bus_bytes, rel=0.05)
    assert block.brought_seconds == pytest.approx(block.stored_bytes / rates.bus_bytes, rel=0.05)
    step = report.run.plan.forecast.compute_seconds / report.run.plan.blocks
    assert block.computed_seconds == pytest.approx(step, rel=0.5)  # with the layers before and behind the blocks
    assert not gpu.races


def test_a_report_and_progress_tell_the_cards_seconds(tiny_models: TinyModels) -> None:
    """Steps of ten seconds, which the host issues in none, and a sampler that waits for nothing."""
    at_one, _ = step_seconds(tiny_models, Rates(flops=1.0))
    told: list[Mapping[str, Any]] = []
    with SimulatedGPU("late", costs=Rates(flops=at_one / 10)) as gpu:
        rig = Rig(tiny_models, gpu)
        model, timeline = rig.transformer("bf16"), Timeline()
        around = Alone(on_progress=told.append)
        report = sample(rig, model, known(rig, FIRST), ("most", "least"), around=around, timeline=timeline)
        finish(model)
    assert report.pass_seconds == pytest.approx(30, rel=0.01)
    assert report.first_step_seconds > 10
    assert report.seconds == pytest.approx(report.first_step_seconds + 20, rel=0.01)
    sampling = next(stage for stage in timeline.reports if stage.stage is Stage.SAMPLING)
    assert sampling.seconds == pytest.approx(30, rel=0.01)
    live = [event for event in told if event["stage"] == "sampling"]
    assert len(live) > 2 * LAYERS
    steps = [{event["seconds_per_step"] for event in live if event["step"] == step} for step in (1, 2, 3)]
    assert steps[0] == {None}
    # the host is two blocks of the second step ahead when it takes the first one for done
    assert len(steps[1]) == len(steps[2]) == 1
    assert 10 * (LAYERS - 2) / LAYERS - 0.1 < min(steps[1]) < 10.1
    assert min(steps[2]) == pytest.approx(10, rel=0.001)


@pytest.mark.parametrize("system", ["nt", "posix"])
def test_steps_of_a_card_that_is_full_are_told_on_windows_and_not_learnt(
    system: str, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its driver lends it RAM: no memory runs out, and all takes longer."""
    monkeypatch.setattr(sampling_run, "spill_warning", partial(spill_warning, system=system))
    at_one, operations = step_seconds(tiny_models, Rates(flops=1.0))
    with SimulatedGPU("late", costs=Rates(flops=at_one / 10)) as gpu:  # ten seconds a step
        rig = Rig(tiny_models, gpu)
        model, thought = rig.transformer("bf16"), replace(FIRST, flops=operations / 2)
        speeds = known(rig, thought)
        report = sample(rig, model, speeds, ("most", "least"))
        assert report.pass_seconds > 3 * 3 * report.plan.forecast.seconds
        warnings = [record.getMessage() for record in caplog.records if "uses RAM instead" in record.getMessage()]
        assert len(warnings) == (1 if system == "nt" else 0)
        assert (speeds.get().flops == thought.flops) is (system == "nt")
        if warnings:
            assert "5 times the forecast of 2.0 s" in warnings[0]
            assert "What to do: " in warnings[0]
        finish(model)


def test_a_disk_that_is_slower_than_thought_is_learnt_on_windows_too(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sampling_run, "spill_warning", partial(spill_warning, system="nt"))
    with SimulatedGPU("late", costs=Rates(FIRST.flops, FIRST.bus_bytes, FIRST.disk_bytes / 40)) as gpu:
        rig = Rig(tiny_models, gpu)
        model, speeds = rig.transformer("bf16"), known(rig, FIRST)
        report = sample(rig, model, speeds, ("least", "least"))
        assert report.pass_seconds > 3 * 3 * report.plan.forecast.seconds
        assert speeds.get().disk_bytes == FIRST.disk_bytes / 4  # as much as one run may change
        assert "uses RAM instead" not in caplog.text
        finish(model)


@pytest.mark.parametrize(
    ("seconds", "system", "told"), [(29.9, "nt", False), (30.0, "nt", True), (300.0, "posix", False)]
)
def test_no_other_system_lends_a_card_memory_unseen(seconds: float, system: str, told: bool) -> None:
    assert bool(spill_warning(seconds, 10.0, system=system)) is told
