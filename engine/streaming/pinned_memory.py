"""Host memory that the device copies from: a few buffers that file bytes pass through, and blocks that stay.

Page-locked where that is granted, and never more of it than the hardware says; a refusal costs speed, not the run.
"""

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hardware import Hardware
from ..log import logger


@dataclass(eq=False)
class HostBuffer:
    """`nbytes` bytes on the host. `pinned`: page-locked, so that the device copies from it by itself."""

    data: Tensor
    pinned: bool


class PinnedMemory:
    """Hands out host buffers, locking their pages while that is granted; they are given back when let go of. By any
    number of threads at a time."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._granting = hardware.pinned
        self._locked_bytes = 0
        self._locking = threading.Lock()
        self._counting = threading.RLock()  # a buffer may be let go of while its thread is within

    def take(self, nbytes: int, *, spare_bytes: int = 0) -> HostBuffer:
        """A buffer of exactly `nbytes`: torch's own page-locked allocations take the next power of two. It is not
        page-locked where `spare_bytes` more could not be."""
        # nodes run in inference mode, and a reader thread may not write to what was made there
        with torch.inference_mode(False):
            data = torch.empty(nbytes, dtype=torch.uint8)
        buffer = HostBuffer(data, self._lock(data, spare_bytes))
        if buffer.pinned:
            # the finalizer keeps the bytes until they are unlocked
            weakref.finalize(buffer, self._give_back, data).atexit = False
        return buffer

    def _lock(self, data: Tensor, spare_bytes: int) -> bool:
        locks = self._hardware.page_locks
        with self._counting:
            most = self._hardware.pinned_limit_bytes - spare_bytes
            if not self._granting or self._locked_bytes + data.nbytes > most:
                return False
            self._locked_bytes += data.nbytes
        with self._locking:  # so that the room is still there
            room = locks.has_room(data.nbytes + spare_bytes)
            if room and locks.lock(data, self._hardware.device):
                return True
        with self._counting:
            self._locked_bytes -= data.nbytes
            first = room and self._granting
            self._granting = self._granting and not room
        if first:
            logger.warning(
                "%s refuses to page-lock %d MB of RAM beside %d MB: copies to %s will be slower. Close other "
                "programs, or set a lower RAM limit.",
                locks.name,
                data.nbytes // 1024**2,
                self._locked_bytes // 1024**2,
                self._hardware.device,
            )
        return False

    def ask_again(self) -> None:
        """After a refusal: the next request may be granted."""
        self._granting = self._hardware.pinned

    def _give_back(self, data: Tensor) -> None:
        if self._hardware.page_locks.unlock(data, self._hardware.device):
            with self._counting:
                self._locked_bytes -= data.nbytes
            return
        logger.warning(
            "%d MB of RAM cannot be unlocked again: they count as page-locked until the program ends.",
            data.nbytes // 1024**2,
        )
