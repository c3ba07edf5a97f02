"""Progress moves with the card and interruptions are obeyed within two blocks' time, and no step is slower for it."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.runs.decode import VaeRun
from qwenimage_lowvram.engine.runs.limit import Limit
from qwenimage_lowvram.engine.runs.surroundings import Alone, Bar
from qwenimage_lowvram.engine.runs.timeline import Timeline

from . import beside, seams
from .costs import Rates
from .device import SimulatedGPU
from .mutations import ordering_calls
from .rig import Rig, finish, host
from .tiny_models import LAYERS, TinyModels

pytestmark = pytest.mark.slow
ALL, HALF = tuple(range(LAYERS)), (0, 3)
TIMES = (1.0, 0.7, 0.4)
FLOPS = 1e9
KEEPS_PACE = next(call for call in ordering_calls() if call.name == "streams.keep: host_waits")


class Interrupted(Exception):
    pass


@dataclass
class Told:
    """When a run tells of its blocks, in simulated seconds: the host's moment, and when the cards are done with all
    that they were given before."""

    gpu: SimulatedGPU
    at: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, *progress: int) -> None:
        ready = max(stream.seconds for stream in self.gpu.streams if stream.computes)
        self.at.append((time.perf_counter(), ready))

    def require_near(self, block_seconds: float) -> None:
        """When the third and each later block is told of, the last but one is done."""
        for i, ((_, before), _, (now, _)) in enumerate(zip(self.at, self.at[1:], self.at[2:], strict=False), 2):
            assert now > before + 0.999 * block_seconds, f"at {i} the host is far ahead of the card"

    def require_busy(self, block_seconds: float, *, step: int = LAYERS) -> None:
        """At the third and each later block of a step, the card has still all of the last to do."""
        for i, (now, ready) in enumerate(self.at):
            assert i % step < 2 or ready - now > 0.999 * block_seconds, f"at {i} the card runs dry"


def steps(
    models: TinyModels, costs: Rates, *, resident: Any, slots: int, second: range | None = None, keeps_pace: bool = True
) -> tuple[Told, float]:
    """Three steps of a transformer, and when the card is done with them. Not `keeps_pace`: without the host's waits."""
    with SimulatedGPU("late", costs=costs) as gpu, nullcontext() if keeps_pace else KEEPS_PACE.removed():
        rig = Rig(models, gpu)
        model = rig.transformer("bf16")
        assert rig.other is not None
        there = () if second is None else seams.on_second(rig.other.device, second)
        model.load(resident, ALL, there)
        model.modulation.announce(TIMES)
        told = Told(gpu)
        branches = [rig.branches(timestep) for timestep in TIMES]
        with seams.session(model, slots, there) as session:
            begun = time.perf_counter()
            for i, branch in enumerate(branches):
                answers = session.forward(branch, more=i + 1 < len(TIMES), on_block=told)
            host(answers)
            seconds = time.perf_counter() - begun
        finish(model)
    return told, seconds


@pytest.fixture(scope="module")
def block_seconds(tiny_models: TinyModels) -> float:
    """Of computing alone."""
    told, _ = steps(tiny_models, Rates(flops=FLOPS), resident=ALL, slots=1)
    return told.at[2][1] - told.at[1][1]


@pytest.mark.parametrize(
    ("resident", "slots", "bus_bytes"),
    [((), 1, 1e6), ((), 2, 1e9), (HALF, 2, 1e6), (HALF, 3, 1e9), (ALL, 2, 1e9)],
)
def test_the_host_is_told_of_a_block_while_the_card_is_at_the_one_before(
    resident: Any, slots: int, bus_bytes: float, tiny_models: TinyModels, block_seconds: float
) -> None:
    told, _ = steps(tiny_models, Rates(flops=FLOPS, bus_bytes=bus_bytes), resident=resident, slots=slots)
    assert len(told.at) == len(TIMES) * LAYERS
    told.require_near(block_seconds)
    told.require_busy(block_seconds)


@pytest.mark.parametrize("bus_bytes", [1e9, 1e6])
def test_the_host_is_as_near_to_two_cards_that_take_turns(
    bus_bytes: float, tiny_models: TinyModels, block_seconds: float
) -> None:
    costs = Rates(flops=FLOPS, bus_bytes=bus_bytes)
    told, _ = steps(tiny_models, costs, resident=(0,), slots=2, second=range(3, LAYERS))
    assert len(told.at) == len(TIMES) * LAYERS
    told.require_near(block_seconds)


@pytest.mark.parametrize("resident", [(), HALF, ALL])
def test_an_interruption_is_obeyed_within_two_blocks_time(
    resident: Any, tiny_models: TinyModels, block_seconds: float
) -> None:
    """From the moment when a person asks for it, which is told of with the next block, to when the card is free."""
    with SimulatedGPU("late", costs=Rates(flops=FLOPS)) as gpu:
        rig = Rig(tiny_models, gpu)
        model = rig.transformer("bf16")
        model.load(resident, ALL)
        model.modulation.announce(TIMES)
        branches, asked = rig.branches(TIMES[0]), 0.0

        def check(index: int) -> None:
            if time.perf_counter() >= asked:
                raise Interrupted

        with model.session(slots=2) as session:
            session.forward(branches)  # what is held is there from now on
            gpu.accelerator.synchronize()
            asked = time.perf_counter() + 2.5 * block_seconds
            with pytest.raises(Interrupted):
                session.forward(branches, on_block=check)
            gpu.accelerator.synchronize()
        assert asked < time.perf_counter() < asked + 2 * block_seconds
        finish(model)


@pytest.mark.parametrize(("resident", "bus_bytes"), [((), 1e7), (HALF, 1e9), (ALL, 1e9)])
def test_no_step_is_slower_for_the_hosts_waiting(resident: Any, bus_bytes: float, tiny_models: TinyModels) -> None:
    """A host that takes nearly as long to issue a block as the card takes for it."""
    costs = Rates(flops=FLOPS, bus_bytes=bus_bytes, issue_seconds=1e-5)
    _, seconds = steps(tiny_models, costs, resident=resident, slots=2)
    _, without = steps(tiny_models, costs, resident=resident, slots=2, keeps_pace=False)
    assert seconds == pytest.approx(without, rel=0.01)


class Roomy(Alone):
    """On a card with room for all."""

    def __init__(self, told: Told) -> None:
        super().__init__()
        self._told = told

    def bar(self) -> Bar:
        return self._told

    def device_bytes(self, device: torch.device, limit_bytes: int | None, wanted_bytes: int) -> int:
        return 2**30

    def total_bytes(self, device: torch.device) -> int:
        return 2**30


def layers(rig: Rig, told: Told) -> None:
    beside.text_encoder(rig).encode(beside.PROMPTS, on_layer=told)


def vision_blocks(rig: Rig, told: Told) -> None:
    beside.text_encoder(rig).vision_tower().see(beside.shown_images(), on_block=told)


def modulation(rig: Rig, told: Told) -> None:
    model = rig.transformer("bf16")
    model.return_outside()
    model.modulation.announce(TIMES, on_block=told)
    finish(model)


def encoded_tiles(rig: Rig, told: Told) -> None:
    run = VaeRun(
        beside.image_vae(rig),
        rig.hardware,
        lambda room: None,
        timeline=Timeline(),
        surroundings=Roomy(told),
        limit=Limit(None),
    )
    run.encode(torch.rand(1, 512, 32, 3), tile_px=32, out_device=rig.hardware.device)


@pytest.mark.parametrize("work", [layers, vision_blocks, modulation, encoded_tiles])
def test_all_else_is_told_of_while_the_card_is_at_what_was_before(
    work: Callable[[Rig, Told], None], tiny_models: TinyModels
) -> None:
    with SimulatedGPU("late", costs=Rates(flops=FLOPS, launch_seconds=1e-6)) as gpu:
        told = Told(gpu)
        work(Rig(tiny_models, gpu), told)
    each = min(ready - before for (_, before), (_, ready) in zip(told.at, told.at[1:], strict=False))
    assert each > 0
    told.require_near(each)
    if work is not modulation and work is not vision_blocks:  # whose networks ask for numbers of each block
        told.require_busy(each, step=len(told.at))
