"""The caching allocator: a pool for each stream, given back at the last reference; what is handed out holds garbage."""

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .clocks import AccessLog, Site
from .reserved import Piece, Reserved
from .streams import Stream

if TYPE_CHECKING:
    from .device import SimulatedGPU

GARBAGE = 0xA5
ROUND_BYTES = 512


class Allocation:
    """Device memory of one allocation; all tensors in it hold it. It belongs to the stream that was current when it was
    made, and goes back to that stream's pool the moment its last reference is gone (nothing calls record_stream)."""

    def __init__(self, gpu: "SimulatedGPU", memory: Tensor, stream: Stream, what: str, site: Site) -> None:
        self.gpu, self.memory, self.stream = gpu, memory, stream
        self.log = AccessLog(f"memory of {what} ({' < '.join(site)}), of the {stream}")

    def view(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the host that lies in it, from its first byte on."""
        with torch.inference_mode(False):
            return self.memory[: span_bytes(size, stride, dtype)].view(dtype).as_strided(size, stride)


class Allocator:
    """Counts what is allocated. `fail_at`: the how manieth allocation from now on finds no memory (from 1 on);
    `limit_bytes`: what all cards together have. `requests_of`: how many allocations each stream has asked for.
    `reserved`: what torch would have of the driver by now."""

    def __init__(self, gpu: "SimulatedGPU") -> None:
        self._gpu = gpu
        self._pools: dict[tuple[str, int], list[Tensor]] = {}
        self.limit_bytes: int | None = None
        self.fail_at: int | None = None
        self.allocated_bytes = self.peak_bytes = 0
        self.requests = self.new_blocks = 0
        self.requests_of: Counter[str] = Counter()
        self.reserved = Reserved()

    def allocate(self, nbytes: int, stream: Stream, what: str, site: Site) -> Allocation:
        """Raises torch.OutOfMemoryError."""
        size = max(ROUND_BYTES, -(-nbytes // ROUND_BYTES) * ROUND_BYTES)
        self._require(size)
        self.requests_of[stream.name] += 1
        self.allocated_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
        pool = self._pools.setdefault((stream.name, size), [])
        if not pool:
            self.new_blocks += 1
        with torch.inference_mode(False):
            memory = pool.pop() if pool else torch.empty(size, dtype=torch.uint8)
        allocation = Allocation(self._gpu, memory, stream, what, site)
        self._overwrite(memory, allocation.log, stream, "allocation", site)
        piece = self.reserved.take(nbytes, stream.name)
        weakref.finalize(allocation, self._give_back, memory, allocation.log, stream, piece).atexit = False
        return allocation

    def reset_peak(self) -> None:
        self.peak_bytes = self.allocated_bytes

    def _require(self, size: int) -> None:
        self.requests += 1
        if self.fail_at is not None:
            self.fail_at -= 1
            if not self.fail_at:
                self.fail_at = None
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        if self.limit_bytes is not None and self.allocated_bytes + size > self.limit_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")

    def _give_back(self, memory: Tensor, log: AccessLog, stream: Stream, piece: Piece) -> None:
        with self._gpu.lock:
            self.reserved.give_back(piece)
            self.allocated_bytes -= memory.nbytes
            self._overwrite(memory, log, stream, "given back", self._gpu.site())
            self._pools.setdefault((stream.name, memory.nbytes), []).append(memory)

    def _overwrite(self, memory: Tensor, log: AccessLog, stream: Stream, what: str, site: Site) -> None:
        """Whoever has the memory next writes to it in the order of the stream's work: it is garbage by now."""
        stream.begin()
        self._gpu.accessed(log, (0, memory.nbytes), stream, True, what, site)
        stream.issue_aside(lambda: memory.fill_(GARBAGE))


def span_bytes(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> int:
    """From a tensor's first byte to the one behind its last."""
    if not all(size):
        return 0
    return (sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1) * dtype.itemsize


def extent(tensor: Tensor, memory: Tensor) -> tuple[int, int]:
    """(first byte, byte behind the last) of a host tensor in the memory that it lies in."""
    begin = tensor.data_ptr() - memory.data_ptr()
    return begin, begin + span_bytes(tensor.size(), tensor.stride(), tensor.dtype)
