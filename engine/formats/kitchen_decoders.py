"""How nvfp4, mxfp8 and convrot_w4a4 decode: comfy-kitchen's operators in comfy-kitchen's order, in scratch memory.

(comfy-kitchen, backends/eager/quantization.py, backends/eager/convrot_w4a4.py and float_utils.py.)
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .byte_tables import look_up_into, take_e2m1, take_table
from .rotation import hadamard_bytes, take_hadamard, unrotate
from .scaling import scale_into, scaled
from .scratch import ALIGNMENT, Scratch

TILE_ROWS = 128
TILE_COLUMNS = 4  # of scales
_SPARE_BYTES = 16 * ALIGNMENT  # what pieces are padded with

Kernel = tuple[str, Tensor, Mapping[str, Any]]


class Chunk(NamedTuple):
    """Rows of a weight: where they are wanted, their data, their scales, and what all rows are decoded with."""

    out: Tensor
    data: Tensor
    scales: Tensor
    constants: Sequence[Tensor]


class Decoder(Protocol):
    """Of one format. `group`: neighbours that were rotated together, if any."""

    def kernel(self, out: Tensor, data: Tensor, scales: Tensor, *rest: Tensor, group: int | None) -> Kernel | None:
        """What comfy-kitchen's kernel is called, the destination, and its arguments."""

    def take_constants(
        self, dtype: torch.dtype, group: int | None, rest: Sequence[Tensor], scratch: Scratch
    ) -> Sequence[Tensor]:
        """What all rows are decoded with."""

    def constant_bytes(self, group: int | None) -> int:
        """The most that these take of scratch, and padding."""

    def row_bytes(self, columns: int, *, on_host: bool) -> int:
        """The most that `decode` takes of scratch for a row."""

    def decode(self, chunk: Chunk, scratch: Scratch) -> None: ...


class Nvfp4:
    """Codes of e2m1, the first of two in the higher bits; scales of e4m3 for 16 neighbours and one for all, multiplied
    with each other in the compute dtype."""

    block = 16

    def kernel(self, out: Tensor, data: Tensor, scales: Tensor, *rest: Tensor, group: int | None) -> Kernel | None:
        # as cuBLAS has it: two dimensions, whole tiles
        blocks = scales.view(torch.float8_e4m3fn).view(-(-len(out) // TILE_ROWS) * TILE_ROWS, -1)
        arguments = {"qx": data, "per_tensor_scale": rest[0], "block_scales": blocks, "output_type": out.dtype}
        return "dequantize_nvfp4", out, {**arguments, "hi_first": True}

    def take_constants(
        self, dtype: torch.dtype, group: int | None, rest: Sequence[Tensor], scratch: Scratch
    ) -> Sequence[Tensor]:
        whole = scratch.take(1, 1, dtype=dtype).copy_(rest[0].view(1, 1))
        return whole, take_table(take_e2m1(dtype, scratch), scratch, high_first=True)

    def constant_bytes(self, group: int | None) -> int:
        return _SPARE_BYTES + 4 * (512 + 16)

    def row_bytes(self, columns: int, *, on_host: bool) -> int:
        return columns // 2 * 4 + _scale_columns(columns, self.block) * 4

    def decode(self, chunk: Chunk, scratch: Scratch) -> None:
        out, data, scales, (whole, of_byte) = chunk
        blocks = out.shape[1] // self.block
        scale = _in_rows(scales.view(torch.float8_e4m3fn), out.shape[0], blocks, out.dtype, scratch).mul_(whole)
        look_up_into(out, data, of_byte, scratch).view(-1, blocks, self.block).mul_(scale.unsqueeze(2))


class Mxfp8:
    """e4m3, with powers of two for 32 neighbours."""

    block = 32

    def kernel(self, out: Tensor, data: Tensor, scales: Tensor, *rest: Tensor, group: int | None) -> Kernel | None:
        return None  # it has none

    def take_constants(
        self, dtype: torch.dtype, group: int | None, rest: Sequence[Tensor], scratch: Scratch
    ) -> Sequence[Tensor]:
        return ()

    def constant_bytes(self, group: int | None) -> int:
        return _SPARE_BYTES

    def row_bytes(self, columns: int, *, on_host: bool) -> int:
        return _scale_columns(columns, self.block) * 4 + (4 * columns if on_host else 0)

    def decode(self, chunk: Chunk, scratch: Scratch) -> None:
        out, data, scales, _ = chunk
        blocks = out.shape[1] // self.block
        # eight bits of exponent become fp32's; the smallest one is zero there
        bits = _in_rows(scales.view(torch.uint8), out.shape[0], blocks, torch.int32, scratch).bitwise_left_shift_(23)
        in_blocks = (-1, blocks, self.block)
        scale_into(out.view(in_blocks), data.view(in_blocks), bits.view(torch.float32).unsqueeze(2), scratch)


class ConvrotW4a4:
    """Four bits with a sign, the first of two in the lower ones; a scale for each row; rotated."""

    def kernel(self, out: Tensor, data: Tensor, scales: Tensor, *rest: Tensor, group: int | None) -> Kernel | None:
        arguments = {"qdata": data, "scales": scales, "convrot_groupsize": group}
        return "dequantize_convrot_w4a4_weight", out, {**arguments, "output_dtype": out.dtype}

    def take_constants(
        self, dtype: torch.dtype, group: int | None, rest: Sequence[Tensor], scratch: Scratch
    ) -> Sequence[Tensor]:
        return (take_hadamard(group or 0, torch.float32, scratch),)

    def constant_bytes(self, group: int | None) -> int:
        return _SPARE_BYTES + hadamard_bytes(group or 0)

    def row_bytes(self, columns: int, *, on_host: bool) -> int:
        return columns * 8  # fp32 before and after it is turned; the codes lie where the latter will

    def decode(self, chunk: Chunk, scratch: Scratch) -> None:
        out, data, scales, (hadamard,) = chunk
        rotated = scratch.take(*out.shape)
        with scratch.lent():
            codes = scratch.take(*data.shape, 2, dtype=torch.int8)
            torch.bitwise_left_shift(data, 4, out=codes[..., 0])
            codes[..., 0].bitwise_right_shift_(4)  # with their sign
            torch.bitwise_right_shift(data, 4, out=codes[..., 1])
            scaled(codes.view(out.shape), scales.view(-1, 1), scratch, out=rotated)
        out.copy_(unrotate(scratch.take(*out.shape), rotated, hadamard))


NVFP4, MXFP8, CONVROT_W4A4 = Nvfp4(), Mxfp8(), ConvrotW4a4()


def _scale_columns(columns: int, block: int) -> int:
    """Scales of a row, those that fill up tiles included."""
    return -(-(columns // block) // TILE_COLUMNS) * TILE_COLUMNS


def _in_rows(tiled: Tensor, rows: int, columns: int, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """(rows, columns) scales in that dtype, from tiles of 128 rows and 4 columns, in which four rows that are 32 apart
    are neighbours."""
    down, across = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    tiles = tiled.view(down, across, 32, 4, TILE_COLUMNS).permute(0, 3, 2, 1, 4)
    whole = scratch.take(*tiles.shape, dtype=dtype).copy_(tiles)
    return whole.view(down * TILE_ROWS, across * TILE_COLUMNS)[:rows, :columns]
