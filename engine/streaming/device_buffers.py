"""Bytes on a device that blocks pass through: what is needed together is allocated together."""

from itertools import accumulate

import torch
from torch import Tensor

# bytes that buffers begin at multiples of, as torch's own allocations do
ALIGNMENT = 512


def new_buffers(device: torch.device, *sizes: int) -> list[Tensor]:
    """Uninitialised uint8 tensors of so many bytes, in one allocation, which belongs to the stream that is current.

    The memory is given back when the last of them is let go of.
    """
    starts = [0, *accumulate(-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes in sizes)]
    places = [(start, start + nbytes) for start, nbytes in zip(starts, sizes, strict=False)]
    total = max((end for start, end in places if end > start), default=0)
    # nodes run in inference mode, and a reader thread may not write to what was made there
    with torch.inference_mode(False):
        whole = torch.empty(total, dtype=torch.uint8, device=device)
        return [whole[start:end] for start, end in places]
