"""Products of nvfp4 and mxfp8 weights as they are stored, by comfy-kitchen: numbers with a scale for each block of a
row, whose scales lie in tiles of 128 rows. What they are multiplied with is quantized so, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .stored_products import FOR_ANY_DEVICE, WORKSPACE_BYTES

TILE_ROWS = 128  # whose scales lie together
_NVFP4_BLOCK, _MXFP8_BLOCK = 16, 32  # numbers of a row that share a scale; rows of x come in as many, too
_LARGEST_NVFP4 = 448.0 * 6.0  # the largest scale (e4m3) times the largest number (e2m1)


@dataclass(frozen=True)
class Nvfp4Product:
    """nvfp4. x is divided by what the file gives as the last part (`scaled`), else by what its largest number asks for,
    of all tokens of the layer's x: they are chosen together, and multiplied in any parts."""

    backend: str
    scaled: bool = False
    name = "nvfp4"
    parts_by_row = 1
    tile_rows = TILE_ROWS

    @property
    def of_all_tokens(self) -> bool:
        return not self.scaled

    def measured(self, x: Tensor) -> list[Tensor]:
        if self.scaled:
            return []
        largest = torch.maximum(x.amax(), x.amin().neg())
        return [(largest / _LARGEST_NVFP4).float()]

    def __call__(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        quantize, multiply = load_nvfp4()
        data, scales, scale, given = parts
        x_scale = given.float().reshape(())
        numbers, blocks = quantize(x, x_scale, pad_16x=len(x) % _NVFP4_BLOCK != 0)
        made = multiply(
            numbers,
            data,
            tensor_scale_a=x_scale,
            tensor_scale_b=scale.float().reshape(()),
            block_scale_a=blocks,
            block_scale_b=_in_tiles(scales, len(data), torch.float8_e4m3fn),
            bias=bias,
            out_dtype=x.dtype,
        )
        return made[: len(x)]

    def some_parts(self, rows: int, columns: int, device: torch.device) -> list[Tensor]:
        data = torch.full((rows, columns // 2), 0x22, dtype=torch.uint8, device=device)  # ones
        scales = torch.ones(_tiled(rows), columns // _NVFP4_BLOCK, device=device).to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        return [data, scales, one, one] if self.scaled else [data, scales, one]

    def row_bytes(self, columns: int, rows: int, element_bytes: int) -> int:
        # without a kernel of its own in fp32, scaled, within range, and as codes of 32 bits
        return columns * 28 if self.backend == FOR_ANY_DEVICE else columns

    def fixed_bytes(self, columns: int, rows: int) -> int:
        return WORKSPACE_BYTES

    def unpacking_bytes(self, columns: int, rows: int) -> int:
        return 0


@dataclass(frozen=True)
class Mxfp8Product:
    """mxfp8: e4m3 with powers of two for blocks. Each row of x by itself."""

    backend: str
    name = "mxfp8"
    parts_by_row = 1
    tile_rows = TILE_ROWS
    of_all_tokens = False

    def measured(self, x: Tensor) -> list[Tensor]:
        return []

    def __call__(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        quantize, multiply = load_mxfp8()
        data, scales = parts[:2]
        numbers, blocks = quantize(x, pad_32x=len(x) % _MXFP8_BLOCK != 0)
        made = multiply(
            numbers,
            data,
            block_scale_a=blocks,
            block_scale_b=_in_tiles(scales, len(data), torch.float8_e8m0fnu),
            bias=bias,
            out_dtype=x.dtype,
        )
        return made[: len(x)]

    def some_parts(self, rows: int, columns: int, device: torch.device) -> list[Tensor]:
        data = torch.ones(rows, columns, device=device).to(torch.float8_e4m3fn)
        scales = torch.full((_tiled(rows), columns // _MXFP8_BLOCK), 127, dtype=torch.uint8, device=device)  # ones
        return [data, scales]

    def row_bytes(self, columns: int, rows: int, element_bytes: int) -> int:
        return columns * 14 if self.backend == FOR_ANY_DEVICE else 2 * columns

    def fixed_bytes(self, columns: int, rows: int) -> int:
        return WORKSPACE_BYTES

    def unpacking_bytes(self, columns: int, rows: int) -> int:
        return 0


def _tiled(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS


def _in_tiles(scales: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """In two dimensions, as cuBLAS has them: whole tiles."""
    return scales.view(dtype).reshape(_tiled(rows), -1)


def load_nvfp4() -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """comfy-kitchen's way to nvfp4, and its product. Raises ImportError or AttributeError where they are missing."""
    import comfy_kitchen

    return comfy_kitchen.quantize_nvfp4, comfy_kitchen.scaled_mm_nvfp4


def load_mxfp8() -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """The same of mxfp8."""
    import comfy_kitchen

    return comfy_kitchen.quantize_mxfp8, comfy_kitchen.scaled_mm_mxfp8
