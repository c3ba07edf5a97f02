"""Where an image's patches lie, for Qwen3-VL's vision part: in its table of learned positions, and as rotary angles.

Patches are in the order in which they are merged: two by two, row by row (transformers' vision_utils.py).
"""

import torch
from torch import Tensor

from ..qwen_vl.vision_files import MERGE

_THETA = 10_000.0


def places(height: int, width: int) -> Tensor:
    """(2, height * width) int64: row and column of each patch."""
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    blocks = grid.view(2, height // MERGE, MERGE, width // MERGE, MERGE)
    return blocks.transpose(2, 3).reshape(2, -1)


def table_weights(height: int, width: int, side: int) -> tuple[Tensor, Tensor]:
    """Of the `side` x `side` learned positions, which the image's grid is laid over corner to corner: the four next to
    each patch, (height * width, 4) int64, and their bilinear weights, of the same shape in fp32."""
    rows, columns = places(height, width)
    row_taps, row_weights = _taps(rows, height, side)
    column_taps, column_weights = _taps(columns, width, side)
    indices = row_taps[:, :, None] * side + column_taps[:, None, :]
    weights = row_weights[:, :, None] * column_weights[:, None, :]
    return indices.reshape(-1, 4), weights.reshape(-1, 4)


def rotary(height: int, width: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each patch's angles, (height * width, head_dim) in fp32 on the device: half of the angles from
    its row, half from its column, and the same again for the other half of the head."""
    part = head_dim // 2
    frequencies = 1.0 / (_THETA ** (torch.arange(0, part, 2, dtype=torch.float) / part))
    angles = places(height, width).to(device)[..., None].float() * frequencies.to(device)
    both = angles.transpose(0, 1).flatten(1)
    doubled = torch.cat((both, both), dim=-1)
    return doubled.cos(), doubled.sin()


def _taps(index: Tensor, size: int, side: int) -> tuple[Tensor, Tensor]:
    """Along one axis: the two places in the table next to each index, (N, 2), and their weights."""
    source = index.float() * (side - 1) / torch.tensor(max(size - 1, 1))
    floor = source.floor()
    offsets = torch.arange(2)
    taps = (floor.long()[:, None] + offsets).clamp(0, side - 1)
    return taps, (1 - (source[:, None] - floor[:, None] - offsets).abs()).clamp(min=0)
