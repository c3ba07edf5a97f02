"""The simulated GPU keeps CUDA's rules, shows what breaks them, and computes what the CPU does."""

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils import _device as torch_device

from . import seams
from .device import SimulatedGPU
from .schedules import SCHEDULES

NAMES = [*SCHEDULES, "random"]


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("inference", [False, True])
def test_operators_are_the_cpus_to_the_last_bit(schedule: str, inference: bool) -> None:
    def compute(x: torch.Tensor) -> list[torch.Tensor]:
        y = F.linear(x, x[0, 0]).view(1, 2, 12, 12)
        y[:, :, 3:5] += 1
        out = F.scaled_dot_product_attention(x, x, x)
        parts = torch.split(torch.cat([y, F.gelu(y)], dim=-1), 7, dim=-1)
        return [y, out, *parts, y[y > 0], torch.tensor([1.5, y.sum().item()], device=x.device)]

    x = torch.randn(1, 2, 12, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    wanted = compute(x)
    with SimulatedGPU(schedule, seed=1) as gpu, torch.inference_mode(inference):
        made = [t.cpu() for t in compute(x.to("cuda:0"))]
    assert all(map(torch.equal, made, wanted))
    assert not gpu.races


def _copied(gpu: SimulatedGPU, *, waits: bool) -> torch.Tensor:
    """A side stream writes what the default stream reads."""
    out = torch.zeros(4, device="cuda:0")
    side = gpu.accelerator.Stream("cuda:0")
    side.wait_stream(gpu.current_stream())
    with gpu.on_stream(side):
        out.fill_(1)
    if waits:
        gpu.current_stream().wait_stream(side)
    return (out * 2).cpu()


def test_a_missing_wait_between_streams_is_a_race_on_every_schedule() -> None:
    seen = {}
    for schedule in NAMES:
        with SimulatedGPU(schedule) as gpu:
            seen[schedule] = _copied(gpu, waits=False).tolist()
        assert gpu.races, schedule
        with SimulatedGPU(schedule) as gpu:
            assert _copied(gpu, waits=True).tolist() == [2] * 4
        assert not gpu.races, schedule
    assert seen["at once"] == [2] * 4  # where nothing shows it, the clocks do
    assert seen["copies late"] == [0] * 4


def test_memory_goes_back_to_its_streams_pool_as_garbage() -> None:
    def reader_on_another_stream(gpu: SimulatedGPU, waits: bool) -> list[float]:
        side = gpu.accelerator.Stream("cuda:0")
        x = torch.ones(4, device="cuda:0")
        side.wait_stream(gpu.current_stream())
        with gpu.on_stream(side):
            y = x + 1
        if waits:
            gpu.current_stream().wait_stream(side)
        del x  # the default stream may write there from now on
        gc.collect()
        torch.zeros(4, device="cuda:0").cpu()
        side.synchronize()
        values: list[float] = y.tolist()
        return values

    with SimulatedGPU("copies late") as gpu:
        assert reader_on_another_stream(gpu, waits=False) != [2] * 4
    assert any("given back" in race for race in gpu.races)
    with SimulatedGPU("copies late") as gpu:
        assert reader_on_another_stream(gpu, waits=True) == [2] * 4
        assert not gpu.races
        made = gpu.allocator.new_blocks
        torch.empty(3, device="cuda:0")
        assert gpu.allocator.new_blocks == made  # out of the pool
        gc.collect()
        assert gpu.allocator.allocated_bytes == 0


def _upload(gpu: SimulatedGPU, *, locked: bool, waits: bool = False) -> list[int]:
    data = torch.arange(4, dtype=torch.uint8)
    if locked:
        gpu.page_locks.lock(data)
    out = torch.empty(4, dtype=torch.uint8, device="cuda:0")
    out.copy_(data, non_blocking=True)
    if waits:
        gpu.current_stream().synchronize()
    data.fill_(9)
    values: list[int] = out.tolist()
    if locked:
        gpu.page_locks.unlock(data)
    return values


def test_only_copies_from_page_locked_memory_are_asynchronous() -> None:
    with SimulatedGPU("late") as gpu:
        assert _upload(gpu, locked=False) == [0, 1, 2, 3]
        assert not gpu.races
        assert sum(gpu.pageable.values()) == 1
        assert _upload(gpu, locked=True, waits=True) == [0, 1, 2, 3]
        assert not gpu.races
        assert _upload(gpu, locked=True) == [9] * 4
    assert any("fill_" in race for race in gpu.races)


def test_an_event_that_was_never_recorded_holds_nobody_up_and_the_latest_record_counts() -> None:
    with SimulatedGPU("late") as gpu:
        event = gpu.accelerator.Event(enable_timing=True)
        event.synchronize()
        gpu.current_stream().wait_event(event)
        assert event.query()
        torch.ones(4, device="cuda:0")
        event.record()
        assert not event.query()
        with pytest.raises(RuntimeError, match="completed"):
            event.elapsed_time(event)
        event.synchronize()
        assert event.query()
        event.record()
        assert not event.query()


def test_threads_are_ordered_by_submit_and_result_alone() -> None:
    for by_result in (True, False):
        with SimulatedGPU("late") as gpu, ThreadPoolExecutor(1) as pool:
            data = torch.zeros(4, dtype=torch.uint8)
            gpu.page_locks.lock(data)
            future = pool.submit(data.fill_, 1)
            while not future.done():
                pass
            if by_result:
                future.result()
            data.add_(1)
        assert bool(gpu.races) is not by_result


def test_memory_runs_out_where_it_is_told_to() -> None:
    with SimulatedGPU("late") as gpu:
        gpu.allocator.fail_at = 2
        kept = torch.empty(4, device="cuda:0")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(4, device="cuda:0")
        torch.empty(4, device="cuda:0")
        gpu.allocator.limit_bytes = gpu.allocator.allocated_bytes
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**20, device="cuda:0")
        del kept


def test_tensors_of_two_cards_do_not_meet() -> None:
    with SimulatedGPU("late"):
        one, other = torch.ones(4, device="cuda:0"), torch.ones(4, device="cuda:1")
        with pytest.raises(RuntimeError, match="same device"):
            one + other
        with pytest.raises(RuntimeError, match="same device"):
            one + torch.ones(4)
        assert (one + other.to("cuda:0")).tolist() == [2] * 4


def test_torch_is_as_before_when_the_gpu_has_gone() -> None:
    before: list[Callable[..., Any]] = [torch.tensor, F.scaled_dot_product_attention, ThreadPoolExecutor.submit]
    with SimulatedGPU("late"):
        assert torch.tensor is not before[0]
    assert [torch.tensor, F.scaled_dot_product_attention, ThreadPoolExecutor.submit] == before


def test_torch_is_as_it_was_once_the_gpu_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_device._device_constructors.cache_clear()  # as in a process that has made nothing on "meta" yet
    with SimulatedGPU():
        with torch.device("meta"):
            assert torch.tensor([1.0]).is_meta
        stand_in = F.scaled_dot_product_attention
    with torch.device("meta"):
        assert torch.tensor([1.0]).is_meta
    assert seams.kept_stand_ins() == []
    monkeypatch.setattr(torch_device, "attention", stand_in, raising=False)  # as one that was imported within it
    assert seams.kept_stand_ins() == ["torch.utils._device.attention"]
