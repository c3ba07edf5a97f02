"""Rows of equal size in host memory: those that a pass needs lie on the device, and the next one is on its way there.

A step needs a few MB that are known before it begins. Brought when the step asks for them, they would hold the host up
until the device has done all of the step before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..hardware import Hardware
from .device_buffers import new_buffers
from .pinned_memory import HostBuffer
from .streams import Mark, StreamOrder


@dataclass(eq=False)
class _Slot:
    data: Tensor
    filled: Mark  # recorded on the copy stream when the row is there
    used: Mark  # recorded on the compute stream behind all that read what was there before
    row: HostBuffer | None = None  # kept as long as the device may read it


class RowSlots:
    """Owns the rows' buffers on the device: one for each row of a pass and one for the next, until `leave_device`.

    Guarantees: where rows are page-locked the host waits for nothing; a row is whole before what is computed next, and
    is not overwritten before all that was issued to read it is done.
    """

    def __init__(self, order: StreamOrder, hardware: Hardware) -> None:
        """`order`: whose copy stream brings the rows; one of their own, or they would stand in line behind blocks."""
        self._order = order
        self._hardware = hardware
        self._slots: list[_Slot] = []

    def bring(self, rows: Sequence[HostBuffer], following: HostBuffer | None = None) -> list[Tensor]:
        """The bytes of these rows on the device, for what is issued from now on until the next call; `following` is
        brought beside them."""
        if self._hardware.host_device:
            return [row.data for row in rows]
        wanted = [*rows, following] if following is not None else rows
        free = [slot for slot in self._slots if slot.row not in wanted]
        held = {slot.row: slot for slot in self._slots if slot.row in wanted}
        for row in wanted:
            if row not in held:
                held[row] = self._fill(free.pop() if free else self._new_slot(row), row)
        for row in rows:
            self._order.compute_waits(held[row].filled)
        return [held[row].data for row in rows]

    def leave_device(self) -> None:
        """Give the buffers back. The host waits until nothing is under way to them."""
        if self._slots:
            self._order.finish()
            self._slots.clear()

    def _new_slot(self, row: HostBuffer) -> _Slot:
        (data,) = new_buffers(self._hardware.device, len(row.data))
        slot = _Slot(data, self._order.mark(), self._order.mark())
        self._slots.append(slot)
        return slot

    def _fill(self, slot: _Slot, row: HostBuffer) -> _Slot:
        # also where the slot is new: its memory may be another tensor's that is being read
        self._order.record_compute(slot.used)
        self._order.copy_waits(slot.used)
        with self._order.copying():
            slot.data.copy_(row.data, non_blocking=row.pinned)
        self._order.record_copy(slot.filled)
        slot.row = row
        return slot
