"""Page-locked host memory: who reads and writes it, and garbage once it is unlocked."""

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .allocator import GARBAGE, extent
from .clocks import AccessLog
from .streams import Stream, as_device

if TYPE_CHECKING:
    from .device import SimulatedGPU


class PageLocks:
    """All host memory that the device may read by itself; the engine's PageLocks."""

    name = "The simulated system"

    def __init__(self, gpu: "SimulatedGPU") -> None:
        self._gpu = gpu
        self._locked: dict[int, tuple[Tensor, AccessLog]] = {}  # by address

    def __len__(self) -> int:
        return len(self._locked)

    def has_room(self, nbytes: int) -> bool:
        return True

    def lock(self, data: Tensor, device: torch.device | None = None) -> bool:
        with self._gpu.lock:
            log = AccessLog(f"page-locked memory ({' < '.join(self._gpu.site())})")
            self._locked[data.data_ptr()] = data, log
        return True

    def lend(self, data: Tensor) -> None:
        """Of torch's own page-locked memory, which has others wait until the device is done with it."""
        alias = data.detach()
        self.lock(alias)
        weakref.finalize(data, self._take_back, alias.data_ptr()).atexit = False

    def _take_back(self, address: int) -> None:
        with self._gpu.lock:
            del self._locked[address]

    def unlock(self, data: Tensor, device: torch.device | None = None) -> bool:
        """Its owner has let go of it: it may be anybody's from now on."""
        self.host_access(data, True, "unlocked")
        with self._gpu.lock:
            del self._locked[data.data_ptr()]
            with as_device():
                data.fill_(GARBAGE)
        return True

    def holds(self, tensor: Tensor) -> bool:
        return self._find(tensor) is not None

    def host_access(self, tensor: Tensor, writes: bool, what: str) -> None:
        """By the present thread; of no interest where the memory is not page-locked."""
        with self._gpu.lock:
            found = self._find(tensor)
            if found is not None:
                host = self._gpu.threads.here()
                host.step()
                self._gpu.accessed(found[1], extent(tensor, found[0]), host, writes, what, self._gpu.site())

    def device_accesses(self, tensor: Tensor, stream: Stream, writes: bool, what: str) -> None:
        found = self._find(tensor)
        assert found is not None
        self._gpu.accessed(found[1], extent(tensor, found[0]), stream, writes, what, self._gpu.site())

    def _find(self, tensor: Tensor) -> tuple[Tensor, AccessLog] | None:
        if not tensor.numel():
            return None
        at = tensor.data_ptr()
        for begin, (data, log) in self._locked.items():
            if begin <= at < begin + data.nbytes:
                return data, log
        return None
