"""Two 4-bit codes in a byte, looked up together: a table of what a byte stands for. In scratch memory."""

import torch
from torch import Tensor

from .scratch import Scratch

# doubles of what four bits of e2m1 stand for; the second eight are below zero
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)


def take_e2m1(dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """(16,): 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same below zero."""
    numbers = scratch.take(16, dtype=dtype)
    for code, doubled in enumerate(_E2M1_DOUBLED):
        numbers[code::8].fill_(doubled / 2)  # filled in: a list would be copied from the host, which waits
    numbers[8:].neg_()
    return numbers


def take_table(numbers: Tensor, scratch: Scratch, *, high_first: bool = False) -> Tensor:
    """(256, 2), of the dtype of the 16 `numbers`: what the lower and the higher four bits of a byte stand for, or the
    higher ones first."""
    of_byte = scratch.take(16, 16, 2, dtype=numbers.dtype)
    of_byte[:, :, int(high_first)].copy_(numbers)
    of_byte[:, :, 1 - int(high_first)].copy_(numbers.unsqueeze(1))
    return of_byte.view(256, 2)


def look_up_into(out: Tensor, packed: Tensor, table: Tensor, scratch: Scratch) -> Tensor:
    """out (N, 2 * bytes) = what the bytes (N, bytes), uint8, stand for."""
    with scratch.lent():
        index = scratch.take(*packed.shape, dtype=torch.int32).copy_(packed)
        torch.index_select(table, 0, index.view(-1), out=out.view(-1, 2))
    return out
