"""Device memory that host memory's bytes come to."""

from dataclasses import dataclass

from torch import Tensor

from .streams import StreamOrder
from .transfer_clock import TransferClock


@dataclass(frozen=True)
class Landing:
    """Bytes on one device, written by its copy stream and counted by its clock."""

    data: Tensor
    order: StreamOrder
    clock: TransferClock

    def copy(self, source: Tensor, start: int = 0, *, pinned: bool) -> None:
        """These bytes of host memory, to `start` and on. `pinned`: the device copies them by itself."""
        nbytes = len(source)
        with self.order.copying(), self.clock.copying(nbytes):
            self.data[start : start + nbytes].copy_(source, non_blocking=pinned)
