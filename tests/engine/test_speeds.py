"""A machine's speeds are measured quickly, and corrected by what a run took."""

import os
import time
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from qwenimage_lowvram.engine.errors import CheckpointError
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.planning.forecast import Speeds, Throughput, corrected
from qwenimage_lowvram.engine.runs.machine_speeds import measure_bus, measure_disk, measure_flops
from qwenimage_lowvram.engine.streaming import StreamOrder
from qwenimage_lowvram.engine.streaming.transfer_clock import TransferClock

NOTHING = Throughput()
SPEEDS = Speeds(flops=10e12, bus_bytes=10e9, disk_bytes=2e9)


@pytest.mark.slow
@pytest.mark.parametrize("nbytes", [1000, 200_000_000])
def test_measuring_gives_rates(nbytes: int, tmp_path: Path, cpu: Hardware) -> None:
    file = tmp_path / "model"
    file.write_bytes(b"\1" * nbytes)
    assert all(1e8 < measure_flops(cpu, dtype) < 1e15 for dtype in (torch.float32, torch.float16))
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


def learnt(
    step: float,
    waited: float = 0.0,
    *,
    slowed: float = 0.0,
    flops: float = 1e12,
    disk: float = 0.0,
    copied: Throughput = NOTHING,
    read: Throughput = NOTHING,
) -> Speeds:
    return corrected(
        SPEEDS,
        step_flops=flops,
        step_seconds=step,
        waited_seconds=waited,
        slowed_seconds=slowed,
        waited_disk_seconds=disk,
        copied=copied,
        read=read,
    )


def test_a_step_that_never_waited_corrects_the_computing_alone() -> None:
    assert astuple(learnt(3.0, flops=20e12))[:3] == pytest.approx((10e12 * 2 / 3, 10e9, 2e9))


def test_what_a_step_waited_was_not_computing() -> None:
    assert learnt(3.0, 1.0, flops=20e12).flops == pytest.approx(10e12)


def test_what_slows_computing_is_no_product_of_the_model() -> None:
    assert learnt(3.0, slowed=1.0, flops=30e12).flops == pytest.approx(15e12)
    assert learnt(3.0, slowed=2.0, flops=10e12).flops == 10e12  # and where it is most of it, nothing is thought slower
    assert learnt(3.0, slowed=2.0, flops=60e12).flops == pytest.approx(20e12)


def test_computing_that_is_too_short_to_tell_is_never_thought_slower() -> None:
    assert learnt(10.0, 9.99, flops=1e9).flops == 10e12
    assert learnt(10.0, 10.1, flops=1e9).flops == 10e12
    assert learnt(10.0, 9.99, flops=8e12).flops == pytest.approx(16e12)


def test_copies_tell_of_the_bus_whatever_was_waited_for() -> None:
    assert learnt(1.0, copied=Throughput(6_000_000_000, 1.5)).bus_bytes == pytest.approx(4e9)
    assert learnt(1.0, copied=Throughput(6_000_000_000, 0.5)).bus_bytes == pytest.approx(12e9)


def test_a_disk_that_nobody_waited_for_is_never_thought_slower() -> None:
    slow, fast = Throughput(1_000_000_000, 1.0), Throughput(3_000_000_000, 1.0)
    assert learnt(9.0, read=slow).disk_bytes == 2e9
    assert learnt(9.0, read=slow, disk=0.5).disk_bytes == pytest.approx(1e9)
    assert learnt(9.0, read=fast).disk_bytes == pytest.approx(3e9)


@pytest.mark.parametrize("step", [0.001, 1e6])
def test_one_run_changes_no_speed_by_more_than_four_times(step: float) -> None:
    moved = Throughput(10_000_000_000, step)
    speeds = learnt(step, copied=moved, read=moved, disk=step)
    for now, before in zip(astuple(speeds), astuple(SPEEDS), strict=True):
        assert before / 4 <= now <= before * 4


def test_reads_at_the_same_time_count_their_time_once(cpu: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = TransferClock(StreamOrder(cpu))
    with clock.reading(3):
        now = 1.0
        with clock.reading(4):
            now = 3.0
        now = 4.0
    now = 10.0
    with clock.reading(5), clock.copying(7):
        now = 12.0
    assert clock.read == Throughput(12, 6.0)
    assert clock.copied == Throughput(7, 2.0)
    with pytest.raises(OSError, match="gone"), clock.reading(100):
        raise OSError("gone")
    assert clock.read.nbytes == 12
