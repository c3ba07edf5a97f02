"""ggml's smallest types, of one to three bits, which store for 4 or 8 neighbours the row of a table, and signs apart.

As in gguf_blocks.py: (n, block bytes) uint8 -> (n, weights) fp32, in llama.cpp's order of roundings, at most 6 bytes of
memory per weight. The tables are the gguf package's.
"""

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..packages import ggml_quants
from .gguf_blocks import half, scaled


def iq2_xxs(blocks: Tensor, grid: Tensor) -> Tensor:
    groups = blocks[:, 2:].unflatten(1, (8, 8))
    word = _words(groups[..., 4:], torch.int32).squeeze(2)
    scale = half(blocks, 0) * (((word >> 28) & 15) + 0.5) * 0.25
    return scaled(_signed(_rows(grid, groups[..., :4]), _seven_signs(_shifted(word, 0, 7, 14, 21))), scale)


def iq2_xs(blocks: Tensor, grid: Tensor) -> Tensor:
    q = _words(blocks[:, 2:66], torch.int16).int() & 0xFFFF
    scale = half(blocks, 0) * (_nibbles(blocks[:, 66:]) + 0.5) * 0.25
    return scaled(_signed(_rows(grid, q & 511), _seven_signs(q >> 9)), scale)


def iq2_s(blocks: Tensor, grid: Tensor) -> Tensor:
    scale = half(blocks, 0) * (_nibbles(blocks[:, 74:]) + 0.5) * 0.25
    high = _shifted(blocks[:, 66:74], 0, 2, 4, 6) & 3
    weights = _rows(grid, blocks[:, 2:34].int() | (high.flatten(1).int() << 8))
    return scaled(_signed(weights, blocks[:, 34:66]), scale)


def iq3_xxs(blocks: Tensor, grid: Tensor) -> Tensor:
    word = _words(blocks[:, 66:], torch.int32)
    scale = half(blocks, 0) * (((word >> 28) & 15) + 0.5) * 0.5
    return scaled(_signed(_rows(grid, blocks[:, 2:66]), _seven_signs(_shifted(word, 0, 7, 14, 21))), scale)


def iq3_s(blocks: Tensor, grid: Tensor) -> Tensor:
    scale = half(blocks, 0) * (_nibbles(blocks[:, 106:]) * 2 + 1)
    high = _shifted(blocks[:, 66:74], *range(8)) & 1
    weights = _rows(grid, blocks[:, 2:66].int() | (high.flatten(1).int() << 8))
    return scaled(_signed(weights, blocks[:, 74:106]), scale)


def iq1_s(blocks: Tensor, grid: Tensor) -> Tensor:
    high = _words(blocks[:, 34:], torch.int16).int()
    scale = half(blocks, 0) * (((high >> 12) & 7) * 2 + 1)
    row = blocks[:, 2:34].int() | ((_shifted(high, 0, 3, 6, 9) & 7).flatten(1) << 8)
    weights = _rows(grid, row).float().unflatten(1, (8, 32))
    weights += _delta(high & 0x8000).unsqueeze(2)
    return scaled(weights.flatten(1), scale)


def iq1_m(blocks: Tensor, grid: Tensor) -> Tensor:
    packed = _words(blocks[:, 48:], torch.int16).int() & 0xFFFF
    # the scale of all: the highest four bits of each of the four numbers
    digits = (packed >> 12).unbind(1)
    whole = digits[0] | (digits[1] << 4) | (digits[2] << 8) | (digits[3] << 12)
    half = whole.to(torch.int16).view(torch.float16).float().unsqueeze(1)
    scale = half * ((_shifted(packed, 0, 3, 6, 9) & 7).flatten(1) * 2 + 1)
    high = _shifted(blocks[:, 32:48], 0, 4).flatten(1)
    weights = _rows(grid, blocks[:, :32].int() | ((high & 7).int() << 8)).float().unflatten(1, (32, 8))
    weights += _delta(high & 8).unsqueeze(2)
    return scaled(weights.flatten(1), scale)


Decoder = Callable[[Tensor], Tensor]
GRID_DECODERS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "IQ3_S": iq3_s, "IQ3_XXS": iq3_xxs, "IQ2_S": iq2_s, "IQ2_XS": iq2_xs, "IQ2_XXS": iq2_xxs, "IQ1_M": iq1_m,
    "IQ1_S": iq1_s,
}  # fmt: skip
# of a type's table: rows of four or eight numbers of a byte
GRID_BYTES: Mapping[str, int] = {
    "IQ3_S": 2048, "IQ3_XXS": 1024, "IQ2_S": 8192, "IQ2_XS": 4096, "IQ2_XXS": 2048, "IQ1_M": 16384, "IQ1_S": 16384,
}  # fmt: skip


def grid_decoder(kind: str, device: torch.device) -> Decoder:
    """The function of a grid type, with its table on the device."""
    grid, decode = torch.from_numpy(_grid(kind)).to(device), GRID_DECODERS[kind]
    return lambda blocks: decode(blocks, grid)


@cache
def _grid(kind: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.int8]]":
    """(rows, neighbours) int8: what a row number stands for."""
    quant = getattr(ggml_quants(), kind)
    quant.init_grid()
    return np.ascontiguousarray(quant.grid.reshape(quant.grid_shape)).astype(np.int8)


def _words(raw: Tensor, dtype: torch.dtype) -> Tensor:
    return raw.contiguous().view(dtype)


def _shifted(packed: Tensor, *by: int) -> Tensor:
    """(..., len(by)): each number shifted to the right by each."""
    return torch.stack([packed >> bits for bits in by], dim=-1)


def _nibbles(raw: Tensor) -> Tensor:
    """(n, bytes) -> (n, 2 * bytes): of each byte the lower four bits first."""
    return torch.stack([raw & 15, raw >> 4], dim=2).flatten(1)


def _rows(grid: Tensor, row: Tensor) -> Tensor:
    """(n, weights) int8: the grid's numbers of each row number."""
    return grid.index_select(0, row.reshape(-1).int()).view(len(row), -1)


def _seven_signs(q: Tensor) -> Tensor:
    """(n, numbers) uint8: eight signs, of which seven bits are stored; those that are set are an even number."""
    signs = q.flatten(1).bitwise_and(127).to(torch.uint8)
    parity = signs ^ (signs >> 4)
    parity ^= parity >> 2
    parity ^= parity >> 1
    return signs.bitwise_or_((parity & 1) << 7)


def _signed(weights: Tensor, signs: Tensor) -> Tensor:
    """(n, 8 * bytes) fp32: `weights`, int8, those of them negated whose bits are set in `signs` (n, bytes)."""
    bit = torch.arange(8, dtype=torch.uint8, device=signs.device)
    factor = (signs.unsqueeze(2) >> bit).bitwise_and_(1).view(torch.int8).mul_(-2).add_(1)
    weights.unflatten(1, (-1, 8)).mul_(factor)
    del factor
    return weights.float()


def _delta(negative: Tensor) -> Tensor:
    """-1/8 where the number is not zero, else 1/8."""
    return 0.125 - 0.25 * (negative != 0)
