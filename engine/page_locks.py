"""Who locks the pages of host memory, so that a device copies from them by itself. Holds no memory, counts nothing."""

import contextlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class PageLocks(Protocol):
    """Of the program around the engine, where it locks pages too: one count then bounds both."""

    @property
    def name(self) -> str:
        """Who refuses, in the words of a message."""
        ...

    def has_room(self, nbytes: int) -> bool:
        """Whether so many bytes more may be asked for; whoever holds others that are not in use may give them back."""
        ...

    def lock(self, data: Tensor, device: torch.device) -> bool:
        """Whether that was done: `data` lies on the host, and stays where it is until it is unlocked."""
        ...

    def unlock(self, data: Tensor, device: torch.device) -> bool:
        """Whether that was done. Called by any thread, once for what was locked."""
        ...


_FOR_ALL_CARDS = 1  # cudaHostRegisterPortable: else only the card that asked counts them as page-locked


@dataclass(frozen=True)
class CudaPageLocks:
    """The driver's own. The system bounds them, and nobody else here."""

    name: str = "The system"

    def has_room(self, nbytes: int) -> bool:
        return True

    def lock(self, data: Tensor, device: torch.device) -> bool:
        with torch.cuda.device(device):  # else the first card gets a context
            if int(torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.nbytes, _FOR_ALL_CARDS)) == 0:
                return True
        _take_error(device)
        return False

    def unlock(self, data: Tensor, device: torch.device) -> bool:
        with torch.cuda.device(device):
            if int(torch.cuda.cudart().cudaHostUnregister(data.data_ptr())) == 0:
                return True
        _take_error(device)
        return False


CUDA_PAGE_LOCKS = CudaPageLocks()


def _take_error(device: torch.device) -> None:
    """CUDA reports a refusal once more, with the next kernel."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)
