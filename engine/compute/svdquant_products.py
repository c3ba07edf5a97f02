"""Products of SVDQuant's int4 weights as they are stored, by comfy-kitchen: numbers are divided by what smooths them,
and quantized to int4 by groups of 64; two thin matrices multiply them as they are (https://arxiv.org/abs/2411.05007).
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..formats.nunchaku_codecs import SHIFT
from .stored_products import FOR_ANY_DEVICE, OfAnyRows

_GROUP = 64
_PAD_TOKENS = 256  # whole multiples of which its kernels are given


@dataclass(frozen=True)
class SvdquantProduct(OfAnyRows):
    """Parts: codes (N, K / 2), scales (N, K / 64), the second thin matrix (N, rank), the first (K, rank), and what
    smooths (K,). shifted: nunchaku's MLPs add SHIFT to what the codes multiply, so that no number is negative, and
    quantize it to 0..15; their bias makes up for it."""

    backend: str
    rank: int
    shifted: bool = False
    name = "svdquant"
    parts_by_row = 3

    def __call__(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        quantize, multiply = load_svdquant()
        codes = parts[0]
        scales, up, down, smooth = (part.to(x.dtype) for part in parts[1:])
        pad = 1 if self.backend == FOR_ANY_DEVICE else _PAD_TOKENS
        thin = {"lora_x": x} if self.shifted else {}
        numbers, x_scales, thin_x = quantize(
            x + SHIFT if self.shifted else x, smooth, down, pad_size=pad, act_unsigned=self.shifted, **thin
        )
        made = multiply(
            numbers, codes, x_scales, scales.t().contiguous(), thin_x, up, bias=bias, act_unsigned=self.shifted
        )
        if self.backend != FOR_ANY_DEVICE:
            _kept_by_kernels().clear()  # or they would keep some for each number of tokens that they have seen
        return made[: len(x)]

    def some_parts(self, rows: int, columns: int, device: torch.device) -> list[Tensor]:
        codes = torch.ones(rows, columns // 2, dtype=torch.int8, device=device)
        shapes = ((rows, columns // _GROUP), (rows, self.rank), (columns, self.rank), (columns,))
        return [codes, *(torch.ones(shape, device=device) for shape in shapes)]

    def row_bytes(self, columns: int, rows: int, element_bytes: int) -> int:
        shifted = columns * element_bytes if self.shifted else 0
        thin = 4 * self.rank
        if self.backend != FOR_ANY_DEVICE:
            return shifted + columns // 2 + columns // _GROUP * element_bytes + thin
        # smoothed, divided, rounded, and codes of 32 bits; then these as numbers, and the product in parts
        quantized = shifted + columns * (9 + element_bytes // 2)
        return thin + max(quantized, columns * (1 + element_bytes) + 8 * rows)

    def fixed_bytes(self, columns: int, rows: int) -> int:
        by_group = 4 * rows * (columns // _GROUP)
        if self.backend != FOR_ANY_DEVICE:
            return by_group + _PAD_TOKENS * (2 * rows + columns)
        # codes in 32 bits, taken apart and joined; the thin matrices in fp32
        return by_group + rows * columns * 11 + 4 * self.rank * (rows + columns)


@cache
def load_svdquant() -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., Tensor]]:
    """comfy-kitchen's way to int4, and its product. Raises ImportError or AttributeError where they are missing."""
    import comfy_kitchen

    return comfy_kitchen.quantize_svdquant_w4a4, comfy_kitchen.scaled_mm_svdquant_w4a4


@cache
def _kept_by_kernels() -> MutableMapping[Any, Any]:
    """Memory on the card, by sizes."""
    kept: MutableMapping[Any, Any] = import_module("comfy_kitchen.backends.cuda")._SVDQUANT_WORKSPACE_CACHE
    return kept
