"""Products of ComfyUI's rotated 4-bit weights as they are stored, by comfy-kitchen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .eight_bit_products import Int8Product
from .stored_products import FOR_ANY_DEVICE, WORKSPACE_BYTES, OfAnyRows

_WEIGHTS_OF_A_SCALE = 16  # in comfy-kitchen's files


@dataclass(frozen=True)
class W4a4Product(OfAnyRows):
    """convrot_w4a4, int4 with a scale for each row: rows of x are rotated in the same groups and quantized to int4, on
    cards without products of int4 to int8. eight_bits: to int8 on any card, as the file says."""

    backend: str
    group: int
    eight_bits: bool = False
    name = "w4a4"
    parts_by_row = 2

    def __call__(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        data, scale = parts[0], parts[1].reshape(-1)
        operand = "int8" if self.eight_bits else "int4"
        return load_w4a4()(x, data, scale, bias=bias, convrot_groupsize=self.group, linear_dtype=operand)

    def some_parts(self, rows: int, columns: int, device: torch.device) -> list[Tensor]:
        data = torch.ones(rows, columns // 2, dtype=torch.int8, device=device)
        return [data, torch.ones(rows, device=device)]

    def row_bytes(self, columns: int, rows: int, element_bytes: int) -> int:
        if self.backend != FOR_ANY_DEVICE:
            return _of_kernels(columns, rows, element_bytes)
        # x rotated, in int8, and its codes in 32 bits; then these as numbers, and the product before it is scaled
        quantized = columns * (element_bytes + 12)
        return max(quantized, columns * (2 * element_bytes + 1) + rows * element_bytes)

    def fixed_bytes(self, columns: int, rows: int) -> int:
        if self.backend != FOR_ANY_DEVICE:
            return _workspace(columns, rows)
        return rows * columns * 11 + 4 * self.group**2  # codes in 32 bits, apart and joined; what turns x


@dataclass(frozen=True)
class W4a8Product(OfAnyRows):
    """asym_w4a8_int8: codes of a codebook (evenly spaced where there is none), with scales by group and row, which are
    brought to int8; rows of x are rotated in groups of `group` and quantized to int8."""

    backend: str
    group: int
    name = "w4a8"
    parts_by_row = 3

    def __call__(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        data, by_group, by_row, *codebook = parts
        return load_w4a8()(
            x,
            data,
            by_group,
            by_row.reshape(-1),
            codebook=codebook[0] if codebook else None,
            bias=bias,
            group_size=2 * data.shape[1] // by_group.shape[1],
            convrot_groupsize=self.group,
            out_dtype=x.dtype,
        )

    def some_parts(self, rows: int, columns: int, device: torch.device) -> list[Tensor]:
        data = torch.ones(rows, columns // 2, dtype=torch.int8, device=device)
        by_group = torch.ones(rows, columns // _WEIGHTS_OF_A_SCALE, device=device).to(torch.float8_e4m3fn)
        return [data, by_group, torch.ones(rows, device=device), torch.linspace(-1, 1, 16, device=device)]

    def row_bytes(self, columns: int, rows: int, element_bytes: int) -> int:
        if self.backend != FOR_ANY_DEVICE:
            return _of_kernels(columns, rows, element_bytes)
        return Int8Product(self.backend, self.group).row_bytes(columns, rows, element_bytes)

    def fixed_bytes(self, columns: int, rows: int) -> int:
        if self.backend != FOR_ANY_DEVICE:
            return _workspace(columns, rows)
        return rows * columns + Int8Product(self.backend, self.group).fixed_bytes(columns, rows)  # brought to int8

    def unpacking_bytes(self, columns: int, rows: int) -> int:
        # codes in 32 bits, as numbers in fp32, these scaled
        return rows * columns * 16 if self.backend == FOR_ANY_DEVICE else 0


def _of_kernels(columns: int, rows: int, element_bytes: int) -> int:
    """For a row of x: rotated where that is no part of the kernel, in int8, and where no kernel of its own fits the
    product in int32."""
    return columns * (element_bytes + 1) + 4 + 4 * rows


def _workspace(columns: int, rows: int) -> int:
    """Weights in int8, which kernels make of some rows at a time, those for Turing of all."""
    return WORKSPACE_BYTES + columns * rows


@cache
def load_w4a4() -> Callable[..., Tensor]:
    """comfy-kitchen's product. Raises ImportError or AttributeError where it is missing or too old."""
    import comfy_kitchen

    return comfy_kitchen.convrot_w4a4_linear


@cache
def load_w4a8() -> Callable[..., Tensor]:
    """The same of asym_w4a8_int8, from 0.2.27 on."""
    import comfy_kitchen

    return comfy_kitchen.w4a8_int8_linear
