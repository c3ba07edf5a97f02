"""Where a person leaves the dtype open, a card without bf16 is measured once. None is here: stand-ins are."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.runs import dtype_choice
from qwenimage_lowvram.engine.runs.dtype_choice import auto_dtype, encoder_dtype, half_is_faster, product_error
from qwenimage_lowvram.engine.runs.known_trials import KnownTrials
from torch import Tensor

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
PLAIN, WIDE = SimpleNamespace(full_precision=False), SimpleNamespace(full_precision=True)
CHOICES = [
    (PLAIN, True, CUDA, True, torch.bfloat16),
    (PLAIN, False, CUDA, True, torch.float16),
    (PLAIN, False, CUDA, False, torch.float32),
    (PLAIN, False, CPU, True, torch.float32),
    (WIDE, True, CUDA, True, torch.float32),
    (WIDE, False, CUDA, True, torch.float32),
]


@pytest.mark.parametrize(("file", "has_bf16", "device", "faster", "expected"), CHOICES)
def test_what_auto_is(file: Any, has_bf16: bool, device: torch.device, faster: bool, expected: torch.dtype) -> None:
    assert auto_dtype(file, has_bf16=has_bf16, device=device, half_is_faster=lambda: faster) == expected


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, float]:
    """Rates of a card, by dtype, which it may be given; those that were asked for are counted under None."""
    rates: dict[Any, float] = {torch.float16: 8e12, torch.float32: 4e12, None: 0}

    def rate(hardware: Hardware, dtype: torch.dtype) -> float:
        rates[None] += 1
        return rates[dtype]

    monkeypatch.setattr(dtype_choice, "measure_flops", rate)
    return rates


@pytest.mark.parametrize(("half", "faster"), [(8e12, True), (3e12, False)])
def test_a_card_is_measured_once(half: float, faster: bool, measured: Any, cpu: Hardware, tmp_path: Any) -> None:
    measured[torch.float16] = half
    room: list[int] = []
    for _ in range(2):
        tried = KnownTrials(tmp_path / "products.json")
        assert half_is_faster(cpu, "NVIDIA GeForce RTX 2060", tried, room.append) == faster
    assert measured[None] == 2
    assert len(room) == 1
    half_is_faster(cpu, "NVIDIA GeForce GTX 1660", KnownTrials(tmp_path / "products.json"))
    assert measured[None] == 4


@pytest.mark.parametrize("wrong", [float("nan"), 1.1], ids=["no number", "another number"])
def test_a_card_whose_products_in_fp16_are_wrong_computes_in_fp32(
    wrong: float, measured: Any, cpu: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is said of GTX 16 cards."""
    right = dtype_choice.half_linear

    def broken(x: Tensor, weight: Tensor) -> Tensor:
        return right(x, weight) * wrong

    monkeypatch.setattr(dtype_choice, "half_linear", broken)
    assert not half_is_faster(cpu, "card", KnownTrials(None))
    assert measured[None] == 0


def test_products_are_right_here() -> None:
    assert product_error(CPU) < 1e-3


def test_a_text_encoder_does_not_compute_in_fp16() -> None:
    assert encoder_dtype(torch.float16) == torch.float32
    assert encoder_dtype(torch.bfloat16) == torch.bfloat16
