"""Tensors that blocks make once and want again at later visits, by key and block: on the device, or in host memory and
brought ahead on the copy stream. Knows neither what they are nor what they were made of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..hardware import Hardware
from ..log import logger
from ..out_of_memory import reason
from .flat_layout import FlatLayout
from .pinned_memory import HostBuffer, PinnedMemory
from .streams import Mark, StreamOrder


@dataclass
class _Slot:
    buffer: Tensor
    filled: Mark  # recorded on the copy stream behind the copy
    used: Mark  # recorded on the compute stream behind the block that they were handed to
    index: int = -1


@dataclass
class _Entry:
    """What is kept under one key. The layout is that of each block's tensors."""

    layout: FlatLayout | None = None
    device: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    host: dict[int, HostBuffer] = field(default_factory=dict)
    slots: list[_Slot] = field(default_factory=list)
    in_use: _Slot | None = None


class KeptTensors:
    """Owns what blocks left here. Between runs it stays; `place` and `want` say how much of it.

    Guarantees: what is handed out is, bit for bit, what was put in; what was promised to be kept is bounded by `place`;
    a system that refuses memory costs what is kept, not the run. One thread calls it.

    made_tokens: that have gone into a block so that it makes them, counted by who makes them, block by block.
    copied_bytes: brought to the device so far.
    """

    def __init__(
        self, order: StreamOrder, hardware: Hardware, host: PinnedMemory, untaken_bytes: Callable[[], int]
    ) -> None:
        """`untaken_bytes`: of page-locked memory, that blocks on their way still need."""
        self._order, self._hardware, self._memory = order, hardware, host
        self._untaken_bytes = untaken_bytes
        self._entries: dict[str, _Entry] = {}  # what was wanted last, last
        self._device: frozenset[int] = frozenset()
        self._host: frozenset[int] = frozenset()
        self._most_bytes = self._spare_bytes = 0
        self._ahead = False
        self._leaving: list[tuple[Mark, tuple[Tensor, ...]]] = []
        self._sizes: dict[str, int] = {}
        self.made_tokens = self.copied_bytes = 0

    @property
    def resident_bytes(self) -> int:
        """On the device."""
        tensors = (t for entry in self._entries.values() for kept in entry.device.values() for t in kept)
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def held_bytes(self) -> int:
        """In host memory."""
        return sum(buffer.data.nbytes for buffer in self._buffers())

    @property
    def pinned_bytes(self) -> int:
        return sum(buffer.data.nbytes for buffer in self._buffers() if buffer.pinned)

    def place(
        self, device: Iterable[int], host: Iterable[int], most_bytes: int, spare_bytes: int = 0, *, ahead: bool = True
    ) -> None:
        """From now on keep what these blocks make: `most_bytes` for each at the most, of all keys together. What is on
        the device and belongs elsewhere leaves it; what belongs there comes when it is asked for. spare_bytes: of host
        memory, for what has to leave the device between runs. ahead: bring a block's while the one before computes."""
        self._device, self._host = frozenset(device), frozenset(host)
        self._most_bytes, self._spare_bytes, self._ahead = most_bytes, spare_bytes, ahead
        for entry in self._entries.values():
            for index in [i for i in entry.device if i not in self._device]:
                tensors = entry.device.pop(index)
                if index in self._host:
                    self._to_host(entry, index, tensors, wanted=True)
            for index in [i for i in entry.host if i not in self._host | self._device]:
                entry.host.pop(index)
        self._settle()
        self._make_room({})
        self._take_from_spare()

    def want(self, sizes: Mapping[str, int]) -> frozenset[str]:
        """A pass begins that uses these keys, whose tensors take so many bytes for each block. Those that there is room
        for: others are given back for them, the longest unused first."""
        known = [key for key in sizes if key in self._entries]
        for key in known:
            self._entries[key] = self._entries.pop(key)  # the last to be given back
        for entry in self._entries.values():
            self._leave_slots(entry)
        wanted: dict[str, int] = {}
        for key, nbytes in sizes.items():
            if sum(wanted.values()) + nbytes <= self._most_bytes:
                wanted[key] = nbytes
        self._make_room(wanted)
        for key, nbytes in wanted.items():
            self._entries.setdefault(key, _Entry())
            self._sizes[key] = nbytes
        return frozenset(wanted)

    def blocks(self, key: str) -> frozenset[int]:
        """Whose tensors are here."""
        entry = self._entries.get(key, _Entry())
        return frozenset(entry.device) | frozenset(entry.host)

    def put(self, key: str, index: int, tensors: tuple[Tensor, ...]) -> None:
        """Keep them, where block `index` is one whose are kept. They may be used until they are let go of, and not be
        written to."""
        entry = self._entries.get(key)
        if entry is None or index in entry.device or index in entry.host:
            return
        if entry.layout is None:
            entry.layout = FlatLayout.of((str(i), t.dtype, tuple(t.shape)) for i, t in enumerate(tensors))
        if index in self._device:
            entry.device[index] = tensors
        elif index in self._host:
            self._to_host(entry, index, tensors, wanted=True)

    def get(self, key: str, index: int) -> Sequence[Tensor]:
        """The tensors of a block that is among `blocks(key)`; valid until the next are asked for. The block after it
        that lies in host memory is begun to be brought."""
        entry = self._entries[key]
        if entry.in_use is not None:
            self._order.record_compute(entry.in_use.used)
            entry.in_use = None
        if index not in entry.device and index in self._device:
            self._to_device(entry, index)
        if index in entry.device:
            self._bring_next(entry, index)
            return entry.device[index]
        slot = next((slot for slot in entry.slots if slot.index == index), None) or self._bring(entry, index)
        self._order.compute_waits(slot.filled)
        entry.in_use = slot
        self._bring_next(entry, index)
        assert entry.layout is not None
        return list(entry.layout.views(slot.buffer).values())

    def end_run(self) -> None:
        """Give back what only a run needs."""
        self._order.finish()
        self._leaving.clear()
        for entry in self._entries.values():
            self._leave_slots(entry)

    def release(self) -> None:
        """Leave the device. What there is room for in host memory goes there."""
        self.end_run()
        for entry in self._entries.values():
            for index in list(entry.device):
                self._to_host(entry, index, entry.device.pop(index), wanted=False)
        self.end_run()

    def release_host(self) -> None:
        """Leave host memory."""
        self._order.finish()
        for entry in self._entries.values():
            entry.host.clear()

    def forget(self) -> None:
        """Give back everything: what it was made of is another now."""
        self.end_run()
        self._entries.clear()
        self._sizes.clear()

    def _buffers(self) -> Iterable[HostBuffer]:
        return (buffer for entry in self._entries.values() for buffer in entry.host.values())

    def _make_room(self, wanted: Mapping[str, int]) -> None:
        """For all that is wanted, by keys that are not."""
        needed = sum(wanted.values())
        for key in [key for key in reversed(self._entries) if key not in wanted]:
            needed += self._sizes[key]
            if needed > self._most_bytes:
                needed -= self._sizes[key]
                self._order.finish()
                del self._entries[key], self._sizes[key]

    def _take_from_spare(self) -> None:
        """What lies in host memory until the device asks for it is within what is to spare there; what is not, leaves:
        the first blocks', which are the first to be made anew."""
        for entry in self._entries.values():
            for index in sorted(set(entry.host) & self._device, reverse=True):
                nbytes = entry.host[index].data.nbytes
                if nbytes <= self._spare_bytes:
                    self._spare_bytes -= nbytes
                else:
                    del entry.host[index]

    def _to_host(self, entry: _Entry, index: int, tensors: tuple[Tensor, ...], *, wanted: bool) -> None:
        """A copy in host memory, where there is room; beyond what is `wanted` there, within what is to spare."""
        layout = entry.layout
        assert layout is not None
        if not wanted and layout.nbytes > self._spare_bytes:
            return
        try:
            buffer = self._memory.take(layout.nbytes, spare_bytes=self._untaken_bytes())
        except (RuntimeError, MemoryError) as error:
            self._host = frozenset()
            logger.warning(
                "There is no RAM to keep more for later steps (%s); it is computed at every step.", reason(error)
            )
            return
        if not wanted:
            self._spare_bytes -= layout.nbytes
        self._order.after_compute()
        left = self._order.mark()
        with torch.no_grad(), self._order.copying():
            for item, tensor in zip(layout.items, tensors, strict=True):
                item.view(buffer.data).copy_(tensor, non_blocking=buffer.pinned)
        self._order.record_copy(left)
        entry.host[index] = buffer
        self._settle()
        self._leaving.append((left, tensors))

    def _settle(self) -> None:
        """Let go of what was copied: whoever gets its memory, on the compute stream, comes behind the copy."""
        for left, _ in self._leaving:
            self._order.compute_waits(left)
        self._leaving.clear()

    def _to_device(self, entry: _Entry, index: int) -> None:
        assert entry.layout is not None
        buffer = entry.host[index]
        there = self._new_buffer(entry.layout.nbytes)
        self._copy(buffer, there)
        self._order.finish()  # the buffer is given back now
        entry.device[index] = tuple(entry.layout.views(there).values())
        del entry.host[index]
        self._spare_bytes += buffer.data.nbytes

    def _bring(self, entry: _Entry, index: int) -> _Slot:
        buffer = entry.host[index]
        free = [slot for slot in entry.slots if slot is not entry.in_use]
        slot = free[0] if free else None
        if slot is None:
            assert entry.layout is not None
            there = self._new_buffer(entry.layout.nbytes)
            slot = _Slot(there, self._order.mark(), self._order.mark())
            entry.slots.append(slot)
        slot.index = -1  # until it is whole
        self._order.copy_waits(slot.used)
        self._copy(buffer, slot.buffer)
        self._order.record_copy(slot.filled)
        slot.index = index
        return slot

    def _bring_next(self, entry: _Entry, index: int) -> None:
        following = min((i for i in entry.host if i > index and i not in self._device), default=None)
        if following is None or not self._ahead or not entry.host[following].pinned:
            return  # without page-locked memory the host would wait for the copy
        if all(slot.index != following for slot in entry.slots):
            self._bring(entry, following)

    def _leave_slots(self, entry: _Entry) -> None:
        for slot in entry.slots:
            self._order.compute_waits(slot.filled)  # whoever gets its memory, on the compute stream
        entry.slots.clear()
        entry.in_use = None

    def _copy(self, buffer: HostBuffer, there: Tensor) -> None:
        with torch.no_grad(), self._order.copying():
            there.copy_(buffer.data, non_blocking=buffer.pinned)
        if not self._hardware.host_device:
            self.copied_bytes += buffer.data.nbytes

    def _new_buffer(self, nbytes: int) -> Tensor:
        # nodes run in inference mode; what is made there could not be written to elsewhere
        with torch.inference_mode(False):
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._hardware.device)
        self._order.after_compute()
        return buffer
