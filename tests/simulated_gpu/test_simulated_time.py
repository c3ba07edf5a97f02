"""Simulated seconds: streams run beside each other, events order them, and the host's clock moves where it waits."""

import time
from dataclasses import replace

import pytest
import torch
from qwenimage_lowvram.engine.runs.pass_clock import PassClock

from .costs import Rates
from .device import SimulatedGPU
from .rig import TIMES, Rig, finish, host
from .tiny_models import LAYERS, TinyModels


def test_streams_run_beside_each_other_and_the_host_ahead_of_them() -> None:
    with SimulatedGPU("late", costs=Rates(flops=2 * 8**3, launch_seconds=0)) as gpu:
        x = torch.ones(8, 8, device="cuda:0")
        side = gpu.accelerator.Stream("cuda:0")
        first, last = (gpu.accelerator.Event(enable_timing=True) for _ in range(2))
        first.record()
        start = time.perf_counter()
        for _ in range(3):
            x = x @ x  # a second each
        with gpu.on_stream(side):
            y = torch.ones(8, 8, device="cuda:0")
            y @ y
        assert time.perf_counter() == start
        side.synchronize()
        assert time.perf_counter() - start == pytest.approx(1)
        last.record()
        assert not last.query()
        last.synchronize()
        assert time.perf_counter() - start == pytest.approx(3)
        assert first.elapsed_time(last) == pytest.approx(3000)


def test_what_was_told_to_wait_begins_later() -> None:
    with SimulatedGPU("late", costs=Rates(flops=2 * 8**3, bus_bytes=256)) as gpu:
        data = torch.ones(8, 8)
        gpu.page_locks.lock(data)
        side = gpu.accelerator.Stream("cuda:0")
        with gpu.on_stream(side):
            x = data.to("cuda:0", non_blocking=True)  # a second
        gpu.current_stream().wait_stream(side)
        y = x @ x
        start = time.perf_counter()
        gpu.current_stream().synchronize()
        assert time.perf_counter() - start == pytest.approx(2)
        gpu.page_locks.unlock(data)
        assert y.device.type == "cuda"


@pytest.mark.slow
def test_a_run_measures_how_long_its_passes_take_on_the_card_and_not_how_long_they_take_to_issue(
    tiny_models: TinyModels,
) -> None:
    bus_bytes = 1e6
    with SimulatedGPU("late", costs=Rates(bus_bytes=bus_bytes)) as gpu:
        rig = Rig(tiny_models, gpu)
        model = rig.transformer("bf16")
        clock = PassClock(model.store.order)
        model.load((), range(LAYERS))
        model.modulation.announce(TIMES)
        with model.session(slots=2) as session:
            with clock.measuring():
                session.forward(rig.branches(TIMES[0]))
            first = clock.seconds[0]
            before, start = model.store.copied_bytes, time.perf_counter()
            with clock.measuring():
                answers = session.forward(rig.branches(TIMES[1]))
            issued = time.perf_counter() - start
            host(answers)
            copied = (model.store.copied_bytes - before) / bus_bytes
            assert issued < copied * (LAYERS - 1) / LAYERS  # the host is a block ahead
            assert clock.seconds == [first, pytest.approx(copied, rel=0.1)]
        finish(model)


@pytest.mark.slow
def test_the_engine_measures_how_long_the_card_waited_for_blocks(tiny_models: TinyModels) -> None:
    """Where computing takes no time, all of a step's is that of its copies."""
    bus_bytes = 1e6
    with SimulatedGPU("late", costs=Rates(bus_bytes=bus_bytes)) as gpu:
        rig = Rig(tiny_models, gpu)
        model = rig.transformer("bf16")
        model.load((), range(LAYERS))
        model.modulation.announce(TIMES)
        with model.session(slots=2) as session:
            host(session.forward(rig.branches(TIMES[0])))  # which reads what is held from then on
            before, waited = model.store.copied_bytes, session.waits
            host(session.forward(rig.branches(TIMES[1])))
            copied = (model.store.copied_bytes - before) / bus_bytes
            assert copied > 0
            assert (session.waits - waited).seconds == pytest.approx(copied, rel=0.1)
        finish(model)


@pytest.mark.slow
def test_a_steps_row_of_the_table_is_brought_beside_the_step_before(tiny_models: TinyModels) -> None:
    """All blocks are resident: nothing else is copied."""
    rates = Rates(launch_seconds=1e-3)
    seconds = {}
    for bus_bytes in (float("inf"), 1e5):  # with which a row takes 0.08 s
        with SimulatedGPU("late", costs=replace(rates, bus_bytes=bus_bytes)) as gpu:
            rig = Rig(tiny_models, gpu)
            model = rig.transformer("bf16")
            model.load(range(LAYERS))
            model.modulation.announce(TIMES)
            branches = [rig.branches(timestep) for timestep in TIMES]
            clock, made = PassClock(model.store.order), []
            with model.session(slots=2) as session:
                for given in branches:
                    with clock.measuring():
                        made += session.forward(given, more=given is not branches[-1])
                host(made)
            seconds[bus_bytes] = clock.seconds[1]
            finish(model)
    assert model.footprint.row_bytes / 1e5 == pytest.approx(0.0768)
    assert seconds[1e5] == pytest.approx(seconds[float("inf")])
