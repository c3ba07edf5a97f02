"""The same blocks on several devices at a time: each in a slot of its own, and read from the file once for all."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import nn

from ..hardware import Hardware
from .block_layout import StoredBlock
from .store import BlockStore
from .streams import StreamOrder
from .tiers import SlotModules


@dataclass(eq=False)
class SlotsBeside:
    """A slot on each device; None where all blocks lie there by themselves. ready: of the block that was fetched last,
    what lay there by itself."""

    slots: list[SlotModules | None]
    ready: list[nn.Module | None] = field(default_factory=list)


class SideBySide:
    """Several stores of the same blocks, as a BlockStreamer takes them. The first one reads, and holds in host memory,
    for all; what lies on a device is each one's own.

    Guarantees: bytes that come from the file are read once, and their place in the ring is used again when all devices
    have copied them.
    """

    def __init__(self, stores: Sequence[BlockStore]) -> None:
        """One for each device; no device is the host."""
        self._stores = stores
        self._first, *self._others = stores
        self.order = StreamOrder.together([store.order for store in stores])

    @contextmanager
    def led(self) -> Iterator[None]:
        """Within it, the first store brings blocks to all devices. Between two runs."""
        with self._locked():
            self._first.lead(self._others)
        try:
            yield
        finally:
            with self._locked():
                self._first.lead(())

    def set_resident(self, wanted: Sequence[Collection[int]], on_block: Callable[[int], None] | None = None) -> None:
        """Hold exactly these blocks on each device. `on_block`: as `BlockStore.set_resident` has it, of any device."""
        with self._locked():
            self._first.set_resident_beside(self._others, wanted, on_block)

    @property
    def blocks(self) -> tuple[StoredBlock, ...]:
        return self._first.blocks

    @property
    def hardware(self) -> Hardware:
        """Of the first device."""
        return self._first.hardware

    @property
    def ring_pieces(self) -> int:
        return self._first.ring_pieces

    @ring_pieces.setter
    def ring_pieces(self, pieces: int) -> None:
        self._first.ring_pieces = pieces

    def reads_file(self, index: int) -> bool:
        """Whether the next fetch of a block goes to its file."""
        return index not in self._first.held and any(store.lacks(index) for store in self._stores)

    def module(self, index: int) -> tuple[nn.Module, ...] | None:
        """The block's own module on each device, where it is resident and needs no decoding on any."""
        found = [module for store in self._stores if (module := store.module(index)) is not None]
        return tuple(found) if len(found) == len(self._stores) else None

    def new_slots(self, count: int = 1, least_bytes: int = 0) -> list[SlotsBeside]:
        """As `BlockStore.new_slots`, on each device that needs any."""
        need = [any(store.module(i) is None for i in range(len(self.blocks))) for store in self._stores]
        made = [
            store.new_slots(count, least_bytes) if needs else [None] * count
            for store, needs in zip(self._stores, need, strict=True)
        ]
        return [SlotsBeside(list(slots)) for slots in zip(*made, strict=True)]

    def module_in(self, place: SlotsBeside, index: int) -> tuple[nn.Module, ...]:
        """Of block `index`, on each device, which was fetched there."""
        found, place.ready = place.ready, []
        for i, (store, slot) in enumerate(zip(self._stores, place.slots, strict=True)):
            if found[i] is None:
                assert slot is not None
                found[i] = store.module_in(slot, index)
        return tuple(module for module in found if module is not None)

    def make_decoding_room(self, indices: Collection[int]) -> None:
        """As `BlockStore.make_decoding_room`, on each device."""
        for store in self._stores:
            if own := [index for index in indices if store.module(index) is None]:
                store.make_decoding_room(own)

    def fetch_into(self, index: int, place: SlotsBeside, ahead: Sequence[int] = ()) -> None:
        """Bring block `index` to a slot on each device where it does not lie by itself; as `BlockStore.fetch_into`."""
        with self._locked():
            place.ready = [store.module(index) for store in self._stores]
            slots = []
            for i, (store, ready) in enumerate(zip(self._stores, place.ready, strict=True)):
                if ready is None:
                    slots.append((store, place.slots[i] or self._late_slot(place, i)))
            coming = [i for i in (index, *ahead) if any(store.lacks(i) for store in self._stores)]
            self._first.fetch_for(slots, index, coming)

    def end_run(self) -> None:
        for store in self._stores:
            store.end_run()

    def _late_slot(self, place: SlotsBeside, i: int) -> SlotModules:
        """A block that lay on the device by itself has been taken from it since the slots were made."""
        store = self._stores[i]
        (slot,) = store.new_slots()
        store.order.after_compute()
        place.slots[i] = slot
        return slot

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for store in self._stores:
                stack.enter_context(store.lock)
            yield
