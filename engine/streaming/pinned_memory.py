"""Host memory that the device copies from: a few buffers that file bytes pass through, and blocks that stay.

Page-locked where that is granted, and never more of it than the hardware says; a refusal costs speed, not the run.
"""

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
    """Hands out host buffers, locking their pages while that is granted; they are given back when let go of."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._granting = hardware.pinned
        self._locked_bytes = 0

    def take(self, nbytes: int) -> HostBuffer:
        """A buffer of exactly `nbytes`: torch's own page-locked allocations take the next power of two."""
        # nodes run in inference mode, and a reader thread may not write to what was made there
        with torch.inference_mode(False):
            data = torch.empty(nbytes, dtype=torch.uint8)
        hardware = self._hardware
        locks = hardware.page_locks
        pinned = self._granting and self._locked_bytes + nbytes <= hardware.pinned_limit_bytes
        pinned = pinned and locks.has_room(nbytes)
        if pinned and not locks.lock(data, hardware.device):
            self._granting = pinned = False
            logger.warning(
                "%s refuses to page-lock %d MB of RAM beside %d MB: copies to %s will be slower. Close other "
                "programs, or set a lower RAM limit.",
                locks.name,
                nbytes // 1024**2,
                self._locked_bytes // 1024**2,
                hardware.device,
            )
        buffer = HostBuffer(data, pinned)
        if pinned:
            self._locked_bytes += nbytes
            # the finalizer keeps the bytes until they are unlocked
            weakref.finalize(buffer, self._give_back, data).atexit = False
        return buffer

    def ask_again(self) -> None:
        """After a refusal: the next request may be granted."""
        self._granting = self._hardware.pinned

    def _give_back(self, data: Tensor) -> None:
        if self._hardware.page_locks.unlock(data, self._hardware.device):
            self._locked_bytes -= data.nbytes
            return
        logger.warning(
            "%d MB of RAM cannot be unlocked again: they count as page-locked until the program ends.",
            data.nbytes // 1024**2,
        )
