"""ggml's smallest types, of one to three bits, which store for 4 or 8 neighbours the row of a table, and signs apart.

As in gguf_blocks.py, in llama.cpp's order of roundings, with tables beside the blocks: a grid, which is the gguf
package's, and for types that store signs those of eight neighbours.
"""

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..packages import ggml_quants
from .gguf_blocks import Scaled, half, shifts, unpack
from .scratch import Scratch

Tables = tuple[Tensor, ...]


def iq2_xxs(blocks: Tensor, scratch: Scratch, grid: Tensor, signs: Tensor) -> Scaled:
    groups = blocks[:, 2:].unflatten(1, (8, 8))
    scale, of_eight = _scale_and_signs(groups[..., 4:], half(blocks, 0, scratch), 0.25, scratch)
    return Scaled(_signed_rows(_index(groups[..., :4], scratch), grid, of_eight, signs, scratch), scale)


def iq2_xs(blocks: Tensor, scratch: Scratch, grid: Tensor, signs: Tensor) -> Scaled:
    scale = _nibble_scales(blocks[:, 66:], half(blocks, 0, scratch), scratch)
    index = _integers(blocks[:, 2:66], torch.int16, scratch).bitwise_and_(0xFFFF)
    of_eight = torch.bitwise_right_shift(index, 9, out=scratch.take(*index.shape, dtype=torch.int32))
    return Scaled(_signed_rows(index.bitwise_and_(511), grid, of_eight, signs, scratch), scale)


def iq2_s(blocks: Tensor, scratch: Scratch, grid: Tensor, signs: Tensor) -> Scaled:
    scale = _nibble_scales(blocks[:, 74:], half(blocks, 0, scratch), scratch)
    index = _index(blocks[:, 2:34], scratch).add_(_spread(blocks[:, 66:74], 2, scratch), alpha=256)
    return Scaled(_signed_rows(index, grid, _index(blocks[:, 34:66], scratch), signs, scratch), scale)


def iq3_xxs(blocks: Tensor, scratch: Scratch, grid: Tensor, signs: Tensor) -> Scaled:
    scale, of_eight = _scale_and_signs(blocks[:, 66:].unflatten(1, (8, 4)), half(blocks, 0, scratch), 0.5, scratch)
    return Scaled(_signed_rows(_index(blocks[:, 2:66], scratch), grid, of_eight, signs, scratch), scale)


def iq3_s(blocks: Tensor, scratch: Scratch, grid: Tensor, signs: Tensor) -> Scaled:
    nibbles = _spread(blocks[:, 106:], 4, scratch).mul_(2).add_(1)
    scale = torch.mul(nibbles, half(blocks, 0, scratch), out=scratch.take(*nibbles.shape)).unsqueeze(2)
    index = _index(blocks[:, 2:66], scratch).add_(_spread(blocks[:, 66:74], 1, scratch), alpha=256)
    return Scaled(_signed_rows(index, grid, _index(blocks[:, 74:106], scratch), signs, scratch), scale)


def iq1_s(blocks: Tensor, scratch: Scratch, grid: Tensor) -> Scaled:
    high = _integers(blocks[:, 34:], torch.int16, scratch)
    three_bits = torch.bitwise_right_shift(high, 12, out=scratch.take(*high.shape, dtype=torch.int32)).bitwise_and_(7)
    scale = torch.mul(three_bits.mul_(2).add_(1), half(blocks, 0, scratch), out=scratch.take(*high.shape))
    index = _shifted(high, 3, 4, scratch).bitwise_and_(7).flatten(1)
    index.mul_(256).add_(blocks[:, 2:34])
    delta = _delta(high.bitwise_right_shift_(15).bitwise_and_(1), scratch)
    return Scaled(_moved(_rows(grid, index, scratch).unflatten(1, (8, 32)), delta, scratch), scale.unsqueeze(2))


def iq1_m(blocks: Tensor, scratch: Scratch, grid: Tensor) -> Scaled:
    packed = _integers(blocks[:, 48:], torch.int16, scratch).bitwise_and_(0xFFFF)
    # the scale of all: the highest four bits of each of the four numbers
    digits = torch.bitwise_right_shift(packed, 12, out=scratch.take(*packed.shape, dtype=torch.int32))
    whole = digits[:, 0]
    for place in range(1, 4):
        whole.add_(digits[:, place], alpha=16**place)
    bits = scratch.take(len(blocks), 1, dtype=torch.int16).copy_(whole.unsqueeze(1))
    three_bits = _shifted(packed, 3, 4, scratch).bitwise_and_(7).mul_(2).add_(1).flatten(1)
    half_scale = scratch.take(len(blocks), 1).copy_(bits.view(torch.float16))
    scale = torch.mul(three_bits, half_scale, out=scratch.take(*three_bits.shape))
    high = _spread(blocks[:, 32:48], 4, scratch)
    index = _index(high, scratch).bitwise_and_(7)
    index.mul_(256).add_(blocks[:, :32])
    delta = _delta(high.bitwise_right_shift_(3), scratch)
    moved = _moved(_rows(grid, index, scratch).unflatten(1, (32, 8)), delta, scratch)
    return Scaled(moved.view(len(blocks), 16, 16), scale.unsqueeze(2))


GRID_DECODERS: Mapping[str, Callable[..., Scaled]] = {
    "IQ3_S": iq3_s, "IQ3_XXS": iq3_xxs, "IQ2_S": iq2_s, "IQ2_XS": iq2_xs, "IQ2_XXS": iq2_xxs, "IQ1_M": iq1_m,
    "IQ1_S": iq1_s,
}  # fmt: skip
# those that store no signs
_UNSIGNED = ("IQ1_M", "IQ1_S")

# those that store seven of eight; of all eight, those that are set are an even number
_SEVEN_SIGNS = ("IQ2_XXS", "IQ2_XS", "IQ3_XXS")


@cache
def tables(kind: str) -> tuple[tuple[tuple[int, ...], bytes], ...]:
    """What a type needs beside its blocks, shapes and int8 numbers: (rows, neighbours), what a row number stands for;
    and (256 or 128, 8), 1 or -1 for each sign of eight neighbours. Nothing for types without a grid."""
    if kind not in GRID_DECODERS:
        return ()
    quant = getattr(ggml_quants(), kind)
    quant.init_grid()
    grid = quant.grid.reshape(quant.grid_shape)
    found = (grid,) if kind in _UNSIGNED else (grid, _signs(seven=kind in _SEVEN_SIGNS))
    return tuple((table.shape, table.astype(np.int8).tobytes()) for table in found)


def _signs(*, seven: bool) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    bits = (np.arange(128 if seven else 256)[:, None] >> np.arange(8)) & 1
    if seven:
        bits[:, 7] = bits[:, :7].sum(axis=1) % 2
    return 1 - 2 * bits


def _integers(raw: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Bytes read as numbers of that dtype, int32."""
    words = scratch.take(*raw.shape, dtype=torch.uint8).copy_(raw).view(dtype)
    return words if dtype is torch.int32 else scratch.take(*words.shape, dtype=torch.int32).copy_(words)


def _index(raw: Tensor, scratch: Scratch) -> Tensor:
    return scratch.take(*raw.shape, dtype=torch.int32).copy_(raw).flatten(1)


def _shifted(packed: Tensor, step: int, count: int, scratch: Scratch) -> Tensor:
    """(..., count): each number shifted to the right by 0, step, 2 * step, ..."""
    out = scratch.take(*packed.shape, count, dtype=torch.int32)
    with scratch.lent():
        return torch.bitwise_right_shift(packed.unsqueeze(-1), shifts(step, count, torch.int32, scratch), out=out)


def _spread(raw: Tensor, bits: int, scratch: Scratch) -> Tensor:
    """(n, bytes) -> (n, bytes * 8 / bits) uint8: of each byte the lowest bits first."""
    return unpack(raw.unsqueeze(2), bits, scratch).flatten(1)


def _scale_and_signs(raw: Tensor, half_scale: Tensor, factor: float, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Of (n, 8, 4) bytes, eight words whose four highest bits are a scale: (n, 8, 1) fp32; and (n, 32), four times
    seven bits of signs."""
    word = _integers(raw, torch.int32, scratch).view(len(raw), 8)
    of_eight = _shifted(word, 7, 4, scratch).bitwise_and_(127)
    return _times_half(word.bitwise_right_shift_(28).bitwise_and_(15), half_scale, factor, scratch), of_eight


def _nibble_scales(raw: Tensor, half_scale: Tensor, scratch: Scratch) -> Tensor:
    """(n, bytes) -> (n, 2 * bytes, 1)."""
    return _times_half(_spread(raw, 4, scratch), half_scale, 0.25, scratch)


def _times_half(number: Tensor, half_scale: Tensor, factor: float, scratch: Scratch) -> Tensor:
    scale = torch.add(number, 0.5, out=scratch.take(*number.shape))
    return scale.mul_(half_scale).mul_(factor).unsqueeze(2)


def _rows(grid: Tensor, index: Tensor, scratch: Scratch) -> Tensor:
    """(n, weights) int8: the grid's numbers of each row number."""
    rows = scratch.take(index.numel(), grid.shape[1], dtype=torch.int8)
    return torch.index_select(grid, 0, index.view(-1), out=rows).view(len(index), -1)


def _signed_rows(index: Tensor, grid: Tensor, of_eight: Tensor, signs: Tensor, scratch: Scratch) -> Tensor:
    """(n, groups, weights of a scale) int8: the grid's numbers, with the signs of each eight of them."""
    weights = _rows(grid, index, scratch)
    with scratch.lent():
        weights.mul_(_rows(signs, of_eight.flatten(1), scratch))
    return weights


def _delta(negative: Tensor, scratch: Scratch) -> Tensor:
    """-1/8 where the number is 1, 1/8 where it is 0."""
    return torch.mul(negative, -0.25, out=scratch.take(*negative.shape)).add_(0.125).unsqueeze(2)


def _moved(weights: Tensor, delta: Tensor, scratch: Scratch) -> Tensor:
    return torch.add(weights, delta, out=scratch.take(*weights.shape))
