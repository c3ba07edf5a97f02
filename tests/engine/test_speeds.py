"""A machine's speeds are measured quickly, and corrected by what a run took."""

import os
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from qwenimage_lowvram.engine.errors import CheckpointError
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.planning.forecast import Speeds, StepForecast, corrected
from qwenimage_lowvram.engine.runs.machine_speeds import measure_bus, measure_disk, measure_flops

SPEEDS = Speeds(flops=10e12, bus_bytes=10e9, disk_bytes=2e9)


@pytest.mark.slow
@pytest.mark.parametrize("nbytes", [1000, 200_000_000])
def test_measuring_gives_rates(nbytes: int, tmp_path: Path, cpu: Hardware) -> None:
    file = tmp_path / "model"
    file.write_bytes(b"\1" * nbytes)
    assert 1e8 < measure_flops(cpu, torch.float32) < 1e15
    assert 1e8 < measure_bus(cpu) < 1e12
    assert 0 < measure_disk(file) < 1e12


@pytest.mark.skipif(os.name == "nt", reason="Windows makes links for administrators only")
def test_a_file_that_is_gone_or_empty_is_named(tmp_path: Path) -> None:
    empty, dangling, loop = (tmp_path / name for name in ("empty", "dangling", "loop"))
    empty.touch()
    dangling.symlink_to(tmp_path / "nowhere")
    loop.symlink_to(loop)
    for file in (empty, dangling, loop):
        with pytest.raises(CheckpointError, match=file.name):
            measure_disk(file)


def forecast(compute: float, bus: float, disk: float) -> StepForecast:
    return StepForecast(compute, bus, disk, overlapped=True)


def learnt(before: StepForecast, step: float, disk: float = 0.0, bus: float = 0.0, speeds: Speeds = SPEEDS) -> Speeds:
    return corrected(speeds, before, step_seconds=step, waited_disk_seconds=disk, waited_bus_seconds=bus)


def test_a_step_that_never_waited_corrects_the_computing_alone() -> None:
    assert astuple(learnt(forecast(2.0, 0.5, 0.5), 3.0))[:3] == pytest.approx((10e12 * 2 / 3, 10e9, 2e9))


def test_a_step_that_waited_corrects_what_it_waited_for() -> None:
    assert astuple(learnt(forecast(1.0, 0.5, 4.0), 6.0, disk=5.0))[:3] == pytest.approx((10e12, 10e9, 2e9 * 4 / 6))
    assert astuple(learnt(forecast(1.0, 4.0, 0.5), 6.0, bus=5.0))[:3] == pytest.approx((10e12, 10e9 * 4 / 6, 2e9))


def test_a_wait_too_short_to_tell_changes_no_rate() -> None:
    assert astuple(learnt(forecast(9.5, 1.0, 3.0), 10.0, disk=0.3, bus=0.2)) == pytest.approx(astuple(SPEEDS))


def test_what_a_step_disproves_is_raised_again() -> None:
    # forecast: 8 s of reading; the whole step took 5 and waited for nothing
    assert learnt(forecast(5.0, 0.5, 8.0), 5.0).disk_bytes == pytest.approx(2e9 * 8 / 5)


@pytest.mark.parametrize("step", [0.01, 1000.0])
def test_one_run_changes_no_speed_by_more_than_twice(step: float) -> None:
    speeds = learnt(forecast(1.0, 1.0, 1.0), step, disk=step / 2, bus=step / 3)
    for now, before in zip(astuple(speeds), astuple(SPEEDS), strict=True):
        assert before / 2 <= now <= before * 2


@pytest.mark.parametrize("compute", [0.5, 2.0])
@pytest.mark.parametrize("disk", [0.5, 2.0, 8.0])
def test_after_some_runs_the_forecast_is_what_was_measured(compute: float, disk: float) -> None:
    """Whatever the first forecast said: steps of 3 s that wait for half of it."""
    speeds, before = SPEEDS, forecast(compute, 0.0, disk)
    for _ in range(6):
        speeds = learnt(before, 3.0, disk=1.5, speeds=speeds)
        before = forecast(compute * SPEEDS.flops / speeds.flops, 0.0, disk * SPEEDS.disk_bytes / speeds.disk_bytes)
    assert before.seconds == pytest.approx(3.0)
