"""Host memory that the device copies from: a few buffers that file bytes pass through, and blocks that stay.

Page-locked where the system grants it, and never more of it than the hardware says; a refusal costs speed, not the run.
"""

import contextlib
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
        pinned = self._granting and self._locked_bytes + nbytes <= self._hardware.pinned_limit_bytes
        if pinned and not self._lock(data):
            self._granting = pinned = False
            logger.warning(
                "The system refuses to page-lock %d MB of RAM beside %d MB: copies to %s will be slower. Close other "
                "programs, or set a lower RAM limit.",
                nbytes // 1024**2,
                self._locked_bytes // 1024**2,
                self._hardware.device,
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
        self._locked_bytes -= data.nbytes
        self._unlock(data)

    def _lock(self, data: Tensor) -> bool:
        with torch.cuda.device(self._hardware.device):  # else the first card gets a context
            if int(torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.nbytes, 0)) == 0:
                return True
        with contextlib.suppress(RuntimeError):  # CUDA reports the refusal once more, with the next kernel
            torch.zeros(1, device=self._hardware.device).add_(1)
        return False

    def _unlock(self, data: Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(data.data_ptr())
