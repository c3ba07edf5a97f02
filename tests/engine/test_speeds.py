"""A machine's speeds are measured quickly, and corrected by what a run took."""

import time
from pathlib import Path

import pytest
import torch
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.plan.forecast import Speeds, StepForecast, corrected
from qwenimage_lowvram.engine.speeds import measure_speeds

SPEEDS = Speeds(flops=10e12, bus_bytes=10e9, disk_bytes=2e9)


@pytest.mark.parametrize("nbytes", [1000, 200_000_000])
def test_measuring_takes_seconds_and_gives_rates(nbytes: int, tmp_path: Path, cpu: Hardware) -> None:
    file = tmp_path / "model"
    file.write_bytes(b"\1" * nbytes)
    start = time.perf_counter()
    speeds = measure_speeds(cpu, torch.float32, file)
    assert time.perf_counter() - start < 20  # 2 on an idle machine
    assert 1e8 < speeds.flops < 1e15
    assert 1e8 < speeds.bus_bytes < 1e12
    assert 0 < speeds.disk_bytes < 1e12


def forecast(compute: float, bus: float, disk: float) -> StepForecast:
    return StepForecast(compute, bus, disk, overlapped=True)


def test_a_step_that_never_waited_corrects_the_computing_alone() -> None:
    speeds = corrected(SPEEDS, forecast(2.0, 0.5, 0.5), step_seconds=4.0, waited_seconds=0.0)
    assert speeds == Speeds(flops=5e12, bus_bytes=10e9, disk_bytes=2e9)


def test_a_step_that_waited_corrects_what_it_waited_for() -> None:
    on_disk = corrected(SPEEDS, forecast(1.0, 0.5, 3.0), step_seconds=6.0, waited_seconds=5.0)
    assert on_disk == Speeds(flops=10e12, bus_bytes=10e9, disk_bytes=1e9)
    on_bus = corrected(SPEEDS, forecast(1.0, 3.0, 0.5), step_seconds=6.0, waited_seconds=5.0)
    assert on_bus == Speeds(flops=10e12, bus_bytes=5e9, disk_bytes=2e9)


@pytest.mark.parametrize("compute", [0.5, 2.0])
@pytest.mark.parametrize("disk", [0.5, 2.0, 8.0])
def test_a_corrected_forecast_is_what_was_measured(compute: float, disk: float) -> None:
    """Whatever the first forecast said: a step of 3 s that waited for half of it."""
    before = forecast(compute, 0.0, disk)
    speeds = corrected(SPEEDS, before, step_seconds=3.0, waited_seconds=1.5)
    after = forecast(compute * SPEEDS.flops / speeds.flops, 0.0, disk * SPEEDS.disk_bytes / speeds.disk_bytes)
    assert after.seconds == pytest.approx(3.0)
