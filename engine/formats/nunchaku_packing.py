"""Where nunchaku's files keep each number: its order for tensor-core fragments, turned back into rows and columns.

A warp works on tiles of 128 output rows, in which every lane loads what it multiplies; files hold the numbers in the
order of those loads (deepcompressor, backend/nunchaku/utils.py: NunchakuWeightPacker; backend/tinychat/utils.py:
pack_w4). Tiles of rows stand one after another, so that a run of whole tiles is a run of bytes. Only moves numbers.
"""

import torch
from torch import Tensor

TILE_ROWS = 128
TILE_COLUMNS = 64  # of 4-bit codes; two such tiles are loaded together
RANK_STEP = 16
MICRO_GROUP = 16  # weights that share an fp8 scale
AWQ_ROWS = 4  # interleaved with each other
AWQ_COLUMNS = 64


def unpack_codes(packed: Tensor) -> Tensor:
    """(rows, columns / 2) bytes -> the same as bytes of two neighbours of a row each, the first one lower."""
    rows, width = packed.shape
    # a word is eight neighbours of a row: (tile, column tile, 8 packs, 8 lanes, 4 lanes, 2 rows, 2 columns)
    words = packed.view(torch.int32).view(rows // TILE_ROWS, width * 2 // TILE_COLUMNS, 8, 8, 4, 2, 2)
    return words.permute(0, 2, 5, 3, 1, 6, 4).reshape(rows, width // 4).view(torch.uint8)


def unpack_scales(packed: Tensor) -> Tensor:
    """16-bit numbers, (groups, rows) or (rows,) -> (rows, groups); the groups of a vector are one."""
    rows = packed.shape[-1]
    tiles = packed.view(rows // TILE_ROWS, -1, 8, 4, 2, 2)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(rows, -1)


def unpack_micro_scales(packed: Tensor) -> Tensor:
    """fp8 numbers, (groups of 16, rows) -> (rows, groups)."""
    groups, rows = packed.shape
    tiles = packed.view(torch.uint8).view(rows // TILE_ROWS, groups // 4, 8, 4, 4, 4)
    return tiles.permute(0, 4, 3, 2, 1, 5).reshape(rows, groups).view(packed.dtype)


def unpack_down(packed: Tensor) -> Tensor:
    """(columns, rank) -> (rank, columns): what a layer's input is multiplied with first."""
    columns, rank = packed.shape
    tiles = packed.view(columns // 16, rank // 16, 8, 4, 2, 2, 2)
    return tiles.permute(1, 4, 2, 0, 5, 3, 6).reshape(rank, columns)


def unpack_up(packed: Tensor) -> Tensor:
    """(rows, rank), packed -> (rows, rank)."""
    rows, rank = packed.shape
    tiles = packed.view(rows // 16, rank // 16, 8, 4, 2, 2, 2)
    return tiles.permute(0, 4, 2, 1, 5, 3, 6).reshape(rows, rank)


def unpack_awq(packed: Tensor) -> Tensor:
    """(rows / 4, columns / 2) 32-bit words -> (rows, columns) codes from 0 to 15, uint8."""
    rows, columns = len(packed) * AWQ_ROWS, packed.shape[1] * 2
    # four rows take turns; of 32 neighbours, a 16-bit number holds those eight apart
    turns = packed.view(torch.int16).view(len(packed), columns // AWQ_COLUMNS, AWQ_ROWS, 2, 8).transpose(1, 2)
    low_first = turns.contiguous().view(torch.uint8).view(rows, columns // 32, 8, 2)
    codes = torch.empty(rows, columns // 32, 4, 8, dtype=torch.uint8, device=packed.device)
    for half in range(2):
        codes[:, :, 2 * half] = low_first[..., half] & 15
        codes[:, :, 2 * half + 1] = low_first[..., half] >> 4
    return codes.view(rows, columns)
