"""Where nunchaku's files keep each number: its order for tensor-core fragments, turned back into rows and columns.

A warp works on tiles of 128 output rows, in which every lane loads what it multiplies; files hold the numbers in the
order of those loads (deepcompressor, backend/nunchaku/utils.py: NunchakuWeightPacker; backend/tinychat/utils.py:
pack_w4). Tiles of rows stand one after another, so that a run of whole tiles is a run of bytes. Only moves numbers.
"""

import torch
from torch import Tensor

from .scratch import Scratch

TILE_ROWS = 128
TILE_COLUMNS = 64  # of 4-bit codes; two such tiles are loaded together
RANK_STEP = 16
MICRO_GROUP = 16  # weights that share an fp8 scale
AWQ_ROWS = 4  # interleaved with each other
AWQ_COLUMNS = 64


def ordered_codes(packed: Tensor) -> Tensor:
    """(rows, columns / 2) bytes -> a view of them as words of eight neighbours of a row, in the order of rows and
    columns; in a byte the first one is lower."""
    rows, width = packed.shape
    # (tile, column tile, 8 packs, 8 lanes, 4 lanes, 2 rows, 2 columns)
    words = packed.view(torch.int32).view(rows // TILE_ROWS, width * 2 // TILE_COLUMNS, 8, 8, 4, 2, 2)
    return words.permute(0, 2, 5, 3, 1, 6, 4)


def unpack_codes(packed: Tensor, scratch: Scratch) -> Tensor:
    """(rows, columns / 2) bytes -> the same as bytes of two neighbours of a row each, the first one lower; in
    scratch."""
    whole = ordered_codes(packed)
    return scratch.take(*whole.shape, dtype=torch.int32).copy_(whole).view(torch.uint8).view(packed.shape)


def unpacked_scales(packed: Tensor) -> Tensor:
    """16-bit numbers, (groups, rows) or (rows,) -> a view in the order of (rows, groups); a vector's groups are one."""
    tiles = packed.view(packed.shape[-1] // TILE_ROWS, -1, 8, 4, 2, 2)
    return tiles.permute(0, 2, 4, 3, 5, 1)


def unpacked_micro_scales(packed: Tensor) -> Tensor:
    """fp8 numbers, (groups of 16, rows) -> a view in the order of (rows, groups)."""
    groups, rows = packed.shape
    return packed.view(rows // TILE_ROWS, groups // 4, 8, 4, 4, 4).permute(0, 4, 3, 2, 1, 5)


def unpacked_down(packed: Tensor) -> Tensor:
    """(columns, rank) -> a view in the order of (rank, columns): what a layer's input is multiplied with first."""
    columns, rank = packed.shape
    return packed.view(columns // 16, rank // 16, 8, 4, 2, 2, 2).permute(1, 4, 2, 0, 5, 3, 6)


def unpacked_up(packed: Tensor) -> Tensor:
    """(rows, rank), packed -> a view in the order of (rows, rank)."""
    rows, rank = packed.shape
    return packed.view(rows // 16, rank // 16, 8, 4, 2, 2, 2).permute(0, 4, 2, 1, 5, 3, 6)


def unpack_awq(packed: Tensor, scratch: Scratch) -> Tensor:
    """(rows / 4, columns / 2) 32-bit words -> (rows, columns) codes from 0 to 15, uint8; in scratch."""
    rows, columns = len(packed) * AWQ_ROWS, packed.shape[1] * 2
    # four rows take turns; of 32 neighbours, a 16-bit number holds those eight apart
    turns = packed.view(torch.int16).view(len(packed), columns // AWQ_COLUMNS, AWQ_ROWS, 2, 8).transpose(1, 2)
    codes = scratch.take(rows, columns // 32, 4, 8, dtype=torch.uint8)
    with scratch.lent():
        in_rows = scratch.take(*turns.shape, dtype=torch.int16).copy_(turns)
        low_first = in_rows.view(torch.uint8).view(rows, columns // 32, 8, 2)
        for half in range(2):
            torch.bitwise_and(low_first[..., half], 15, out=codes[:, :, 2 * half])
            torch.bitwise_right_shift(low_first[..., half], 4, out=codes[:, :, 2 * half + 1])
    return codes.view(rows, columns)
