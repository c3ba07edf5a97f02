"""Rows that were rotated before they were quantized ("convrot"), turned back: each run of `group` neighbours is
multiplied with a Hadamard matrix, which spreads outliers and undoes itself."""

import torch
from torch import Tensor

from .scratch import Scratch, padded


def unrotate(out: Tensor, rows: Tensor, hadamard: Tensor) -> Tensor:
    """out = rows with each group turned back; (N, K) both, of the matrix's dtype."""
    group = len(hadamard)
    torch.mm(rows.view(-1, group), hadamard.t(), out=out.view(-1, group))
    return out


def take_hadamard(group: int, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """(group, group): the Kronecker power of [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], divided by
    the root of its size, which is exact. `group`: a power of 4."""
    whole = scratch.take(group, group, dtype=dtype)
    with scratch.lent():
        smallest = whole if group == 4 else scratch.take(4, 4, dtype=dtype)
        smallest.fill_(1).view(16)[3:13:3].neg_()
        power = smallest
        while len(power) < group:
            size = 4 * len(power)
            larger = whole if size == group else scratch.take(size, size, dtype=dtype)
            tiles = larger.view(len(power), 4, len(power), 4)
            torch.mul(power[:, None, :, None], smallest[None, :, None, :], out=tiles)
            power = larger
    return whole.div_(group**0.5)


def hadamard_bytes(group: int) -> int:
    """What `take_hadamard` takes of scratch, in fp32."""
    return sum(padded(4 * size**2) for size in (4, 16, 64, 256, 1024) if size <= group)
