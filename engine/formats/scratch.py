"""Scratch memory that codecs cut up: allocated once, by whoever decodes, and used anew for every chunk.

Codecs allocate nothing beside it: on a copy stream an allocation may wait for what is computed meanwhile.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, of each piece
# of what any device has for decoding, in bytes
SCRATCH_BYTES = 64 * 1024**2
_PROBE_BYTES = 2**40


class Scratch:
    """Pieces of a flat uint8 buffer, one behind the other.

    on_host: whether it is a CPU's own memory, where chunks are small, so that they stay in its cache; elsewhere chunks
    are large, because each operation on one has to be launched.
    """

    def __init__(self, buffer: Tensor, *, on_host: bool | None = None) -> None:
        self.on_host = buffer.device.type == "cpu" if on_host is None else on_host
        self.most = 0
        self._buffer = buffer
        self._used = 0

    @classmethod
    def of_nothing(cls, *, on_host: bool) -> "Scratch":
        """Without memory and without an end: `most` tells what was taken."""
        return cls(torch.empty(_PROBE_BYTES, dtype=torch.uint8, device="meta"), on_host=on_host)

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor. Raises RuntimeError where the buffer is too small: scratch_bytes was wrong."""
        nbytes = prod(shape) * dtype.itemsize
        begin, self._used = self._used, self._used + padded(nbytes)
        self.most = max(self.most, self._used)
        if self._used > len(self._buffer):
            raise RuntimeError(f"decoding takes {self._used} bytes of scratch, but was given {len(self._buffer)}")
        return self._buffer[begin : begin + nbytes].view(dtype).view(shape)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """What is taken within is free again behind it."""
        used = self._used
        try:
            yield
        finally:
            self._used = used


def padded(nbytes: int) -> int:
    """What a piece of so many bytes takes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
