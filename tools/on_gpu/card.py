"""A card as the assumptions are tried on it: a real one, or one that a test makes. Needs torch alone."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# what a card is kept busy for while something is tried behind its back
BUSY_SECONDS = 0.1
MOST_TURNS = 20_000


class NotTried(Exception):
    """It cannot be tried here; the message says why."""


@dataclass
class Card:
    """torch: torch.cuda, or what stands for it. lock, unlock: of a host tensor's pages; lock says whether it was done.
    address: of a tensor's first byte on the card. reserved: bytes of it that torch has of the driver. forget: gives
    memory that is kept unused back to that.
    size, turns: of matrix products that keep it busy for BUSY_SECONDS.
    """

    device: torch.device
    torch: Any
    lock: Callable[[Tensor], bool]
    unlock: Callable[[Tensor], object]
    address: Callable[[Tensor], int]
    reserved: Callable[[], int]
    forget: Callable[[], None] = lambda: None
    size: int = 4096
    turns: int = 1
    real: bool = True
    _factor: Tensor | None = field(default=None, repr=False)

    @classmethod
    def real_one(cls, device: torch.device) -> "Card":
        cudart = torch.cuda.cudart()

        def lock(data: Tensor) -> bool:
            return int(cudart.cudaHostRegister(data.data_ptr(), data.nbytes, 0)) == 0

        card = cls(
            device,
            torch.cuda,
            lock,
            unlock=lambda data: cudart.cudaHostUnregister(data.data_ptr()),
            address=lambda tensor: tensor.data_ptr(),
            reserved=lambda: torch.cuda.memory_reserved(device),
            forget=torch.cuda.empty_cache,
        )
        card.calibrate()
        return card

    def calibrate(self) -> None:
        """As many products as take BUSY_SECONDS."""
        self.busy()
        self.torch.synchronize(self.device)
        self.turns = 20
        start = time.perf_counter()
        self.busy()
        self.torch.synchronize(self.device)
        taken = (time.perf_counter() - start) / self.turns
        self.turns = min(MOST_TURNS, max(5, int(BUSY_SECONDS / taken)))

    def busy(self) -> None:
        """Give the current stream work, and do not wait for it."""
        x = self.factor()
        for _ in range(self.turns):
            x @ x

    def factor(self) -> Tensor:
        """What is multiplied; made, and there, when this returns."""
        if self._factor is None:
            self._factor = torch.ones(self.size, self.size, dtype=torch.bfloat16, device=self.device)
            self.torch.synchronize(self.device)
        return self._factor

    def side_stream(self) -> Any:
        return self.torch.Stream(self.device)

    @property
    def compute(self) -> Any:
        return self.torch.current_stream(self.device)

    def recorded(self, stream: Any = None) -> Any:
        """An event behind all that the stream (the current one) was given."""
        event = self.torch.Event()
        event.record(stream or self.compute)
        return event

    def locked(self, nbytes: int) -> Tensor:
        """Page-locked bytes, until `unlock`. Raises NotTried where the system refuses."""
        data = torch.zeros(nbytes, dtype=torch.uint8)
        if not self.lock(data):
            raise NotTried(f"the system refuses to page-lock {nbytes} bytes")
        return data
