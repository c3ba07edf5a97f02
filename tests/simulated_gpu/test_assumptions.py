"""What is tried on real cards (`python dev.py gpu`) holds on the simulated one: both are asked by the same code."""

from typing import Any

import pytest
import torch
from on_gpu import numbers_of_card
from on_gpu.assumptions import ASSUMPTIONS, names, tried
from on_gpu.card import Card
from torch import Tensor

from .costs import Rates
from .device import SimulatedGPU
from .streams import Stream
from .tensors import DeviceTensor


def card_of(gpu: SimulatedGPU, **changes: Any) -> Card:
    def address(tensor: Tensor) -> int:
        assert isinstance(tensor, DeviceTensor)
        return tensor.allocation.memory.data_ptr()

    card = Card(
        torch.device("cuda", 0),
        gpu.accelerator,
        gpu.page_locks.lock,
        gpu.page_locks.unlock,
        address,
        reserved=lambda: gpu.allocator.reserved.nbytes,
        size=8,
        turns=3,
        real=False,
    )
    for name, value in changes.items():
        setattr(card, name, value)
    return card


@pytest.mark.parametrize("costs", [None, Rates(flops=2 * 8**3, bus_bytes=1e12)])
def test_the_simulated_card_does_what_real_ones_are_asked_for(costs: Rates | None) -> None:
    with SimulatedGPU("late", costs=costs) as gpu:
        rows = list(tried(card_of(gpu)))
    assert [row["case"] for row in rows] == names()
    skipped = [row for row in rows if row["status"] == "skipped"]
    assert all(row["why"] for row in skipped)
    assert len(skipped) <= 4
    wrong = [row for row in rows if row["status"] not in ("holds", "skipped")]
    timed = "the host is ahead of the card and events measure the card"
    assert [row["case"] for row in wrong] == ([timed] if costs is None else [])  # work takes no time there


def test_a_card_of_other_habits_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked memory that is taken at once, memory that is never handed out again, streams that wait for each
    other, and waits that see later records."""
    monkeypatch.setattr(Stream, "begin", _behind_all(Stream.begin))
    with SimulatedGPU("late") as gpu:
        monkeypatch.setattr(gpu.page_locks, "holds", lambda data: False)
        kept: list[Tensor] = []
        rows = {row["case"]: row["status"] for row in tried(card_of(gpu, address=_keeping(kept)))}
    assert {case for case, status in rows.items() if status == "does not hold"} >= {
        "page locked memory is read when the copy runs",
        "a side stream waits for nothing by itself",
        "memory is handed out again while another stream reads it",
    }


def _behind_all(begin: Any) -> Any:
    def begin_behind_all(stream: Stream) -> Any:
        for other in list(stream._gpu.streams):
            if other is not stream:
                other.run()
        return begin(stream)

    return begin_behind_all


def _keeping(kept: list[Tensor]) -> Any:
    def address(tensor: Tensor) -> int:
        assert isinstance(tensor, DeviceTensor)
        kept.append(tensor)
        return tensor.allocation.memory.data_ptr()

    return address


def test_every_assumption_is_tried() -> None:
    assert len(ASSUMPTIONS) == len(set(names())) >= 15


def test_the_rates_of_a_card_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers_of_card, "NBYTES", 2**16)
    monkeypatch.setattr(numbers_of_card, "LAUNCHES", 20)
    rates = Rates(flops=1e6, bus_bytes=1e8, launch_seconds=1e-5)
    with SimulatedGPU("late", costs=rates) as gpu:
        rows = {row["case"]: row for row in numbers_of_card.measured(card_of(gpu))}
    assert list(rows) == numbers_of_card.names()
    assert rows["launches"]["small_kernel_seconds"] == pytest.approx(1e-5, rel=0.1)
    assert rows["copies"]["to_card_locked"] == pytest.approx(1e8, rel=0.1)
    beside = rows["computing beside copies"]
    assert beside["flops_beside_copies"] == pytest.approx(1e6, rel=0.1)
    assert beside["to_card_beside_computing"] == pytest.approx(1e8, rel=0.1)
    assert rows["page locks"]["status"] == "failed"  # which take no simulated time
