"""Where each block of one model lies: on the device, in host memory, or in its file alone. Moves no byte by itself."""

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..compute.stored_linear import compute_as_stored
from ..log import logger
from .block_layout import StoredBlock, bind
from .pinned_memory import HostBuffer
from .ring import Passing
from .streams import Pace, StreamOrder
from .transfer import Target, Transfer

# for which host memory is taken before they are read: the block that comes, and the next one
ROOMS_AHEAD = 2


class SlotModules:
    """A buffer on the device, large enough for any block, and modules whose parameters lie in it: one for each form
    that blocks have there, made when the first of them comes."""

    def __init__(self, buffer: Tensor, make_block: Callable[[], nn.Module]) -> None:
        self.buffer = buffer
        self._make_block = make_block
        self._modules: dict[tuple[object, ...], nn.Module] = {}

    def module_of(self, block: StoredBlock) -> nn.Module:
        module = self._modules.get(block.form)
        if module is None:
            with torch.inference_mode(False):
                module = compute_as_stored(self._make_block(), dict(block.computed))
                bind(module, block.slot.views(self.buffer))
            self._modules[block.form] = module
        return module

    def forget(self) -> None:
        """What blocks there compute has changed; their bytes have not."""
        self._modules.clear()


class Tiers:
    """Owns the resident and the held blocks. Whoever changes them, or fetches, holds the store's lock.

    A resident block is either `ready` (its own slot) or `encoded` (at its stored size, decoded at each visit).
    """

    def __init__(
        self,
        blocks: Sequence[StoredBlock],
        make_block: Callable[[], nn.Module],
        order: StreamOrder,
        transfer: Transfer,
    ) -> None:
        self.blocks = tuple(blocks)
        self._make_block = make_block
        self._order = order
        self._transfer = transfer
        self._ready: dict[int, SlotModules] = {}
        self._encoded: dict[int, Tensor] = {}
        self._to_hold: frozenset[int] = frozenset()
        self._held: dict[int, HostBuffer] = {}

    @property
    def resident(self) -> frozenset[int]:
        return frozenset(self._ready) | frozenset(self._encoded)

    @property
    def resident_bytes(self) -> int:
        ready = sum(self.blocks[i].slot.nbytes for i in self._ready)
        return ready + sum(self.blocks[i].raw.nbytes for i in self._encoded)

    @property
    def held(self) -> frozenset[int]:
        return frozenset(self._held)

    @property
    def held_bytes(self) -> int:
        return sum(buffer.data.nbytes for buffer in self._held.values())

    @property
    def pinned_bytes(self) -> int:
        return sum(buffer.data.nbytes for buffer in self._held.values() if buffer.pinned)

    @property
    def order(self) -> StreamOrder:
        """Of all devices that blocks are brought to."""
        return self._transfer.order_of_all

    def missing(self, wanted: Collection[int]) -> frozenset[int]:
        """Those that are not resident."""
        return frozenset(wanted) - self.resident

    def module(self, index: int) -> nn.Module | None:
        slot = self._ready.get(index)
        return None if slot is None else self.module_in(slot, index)

    def lies_there(self, index: int) -> bool:
        """Whether the block is resident."""
        return index in self._ready or index in self._encoded

    def encoded(self, index: int) -> Tensor | None:
        return self._encoded.get(index)

    def reads_file(self, index: int) -> bool:
        return index not in self._held and index not in self._encoded

    def held_of(self, index: int) -> HostBuffer | None:
        """The block's bytes in host memory."""
        return self._held.get(index)

    def passing(self, indices: Iterable[int]) -> list[Passing]:
        """What of these blocks, which are brought in this order, comes through the ring. It ends where memory would
        have to be taken for more than ROOMS_AHEAD."""
        found: list[Passing] = []
        staying: set[int] = set()
        for index in indices:
            held, room = self._held.get(index), None
            if index in staying:
                continue
            if held is None and index in self._to_hold:
                if len(staying) == ROOMS_AHEAD:
                    break
                staying.add(index)
                room = self._transfer.ask_room(index, self.blocks[index])
            elif not self._transfer.passes_ring(held):
                continue
            found.append(Passing(index, self.blocks[index].raw.nbytes, held, room))
        return found

    def new_slots(self, count: int = 1, least_bytes: int = 0) -> list["SlotModules"]:
        """As the store has it."""
        slot_bytes = self._transfer.sizes.slot_bytes
        *buffers, _ = self._transfer.new_buffers(*[slot_bytes] * count, max(0, least_bytes - count * slot_bytes))
        return [SlotModules(buffer, self._make_block) for buffer in buffers]

    def module_in(self, slot: "SlotModules", index: int) -> nn.Module:
        """Of block `index`, once its bytes lie in the slot."""
        return slot.module_of(self.blocks[index])

    def set_resident(self, indices: Iterable[int], on_block: Callable[[int], None] | None) -> None:
        set_resident([self], [set(indices)], on_block)

    def leave(self, wanted: Collection[int]) -> frozenset[int]:
        """Give back the resident blocks that are not wanted; returns which they were."""
        leaving = self.resident.difference(wanted)
        if leaving:
            self._order.finish()  # an encoded block may be read on the copy stream
        for index in leaving:
            self._ready.pop(index, None)
            self._encoded.pop(index, None)
        return leaving

    def bring(self, index: int, homes: Sequence[tuple["Tiers", "SlotModules | Tensor"]]) -> None:
        """A block to its `new_home` on devices, where it stays."""
        held = self._held.get(index)
        targets = [
            Target(one._transfer, one.blocks[index], home.buffer if isinstance(home, SlotModules) else home)
            for one, home in homes
        ]
        with torch.no_grad():
            if self.blocks[index].native:
                self._transfer.fill(index, held, targets)
            else:
                self._transfer.bring(index, held, targets)
        for one, home in homes:
            one._settle(index, home)

    def new_home(self, index: int) -> "SlotModules | Tensor":
        """Memory on the device for a block that is to stay there."""
        block = self.blocks[index]
        if block.native:
            (slot,) = self.new_slots()
            self.module_in(slot, index)  # made here: memory may run out
            self._order.after_compute()
            return slot
        (buffer,) = self._transfer.new_buffers(block.raw.nbytes)
        self._order.after_compute()
        return buffer

    def _settle(self, index: int, home: "SlotModules | Tensor") -> None:
        if isinstance(home, SlotModules):
            self._ready[index] = home
        else:
            self._encoded[index] = home

    def hold_none_of(self, indices: Collection[int]) -> None:
        """They need not be held from now on."""
        self._to_hold = self._to_hold.difference(indices)

    def expect(self, indices: Iterable[int]) -> None:
        """These are brought next, in this order."""
        self._transfer.expect(self.passing(indices))

    def end_run(self) -> None:
        self._transfer.end_run()

    def tell_residents(self, *, came: Iterable[int], left: Iterable[int]) -> None:
        logger.debug(
            "resident blocks: %s came, %s left; now %d of %d, %d bytes",
            sorted(came),
            sorted(left),
            len(self.resident),
            len(self.blocks),
            self.resident_bytes,
        )

    def set_held(self, indices: Iterable[int]) -> None:
        self._to_hold, before = frozenset(indices), self._to_hold
        self._transfer.forget_rooms(before - self._to_hold)
        leaving = self.held - self._to_hold
        if leaving:
            self._order.finish()
        for index in leaving:
            del self._held[index]
        if leaving:
            logger.debug(
                "held blocks: %s left RAM; now %d, %d bytes", sorted(leaving), len(self._held), self.held_bytes
            )

    def hold(self, index: int) -> None:
        """A block has come: where it is to stay in host memory, it is there now.

        Where the system has had no memory for it, no further block is held.
        """
        if index not in self._to_hold or index in self._held:
            return
        room = self._transfer.take_room(index)
        if room.buffer is None:
            self._transfer.forget_rooms(self._to_hold - self.held)
            self._to_hold = self.held
            logger.warning(
                "There is no RAM for more than %d held blocks (%s); the others are read from the file at every step.",
                len(self._held),
                room.reason,
            )
            return
        self._held[index] = room.buffer
        logger.debug(
            "held blocks: %d read into RAM%s; now %d, %d bytes",
            index,
            ", page-locked" if room.buffer.pinned else "",
            len(self._held),
            self.held_bytes,
        )

    def replace(self, blocks: Sequence[StoredBlock]) -> None:
        resident, held = self.resident, self.held
        for index, (old, new) in enumerate(zip(self.blocks, blocks, strict=True)):
            if old.parts != new.parts:
                self._encoded.pop(index, None)
                self._held.pop(index, None)
            if old.parts != new.parts or old.patches != new.patches:
                self._ready.pop(index, None)
            elif old.form != new.form and index in self._ready:
                self._ready[index].forget()
        self.blocks = tuple(blocks)
        if self.resident != resident:
            self.tell_residents(came=(), left=resident - self.resident)
        if self.held != held:
            logger.debug("held blocks: %s changed and left RAM; now %d", sorted(held - self.held), len(self._held))

    def release(self) -> None:
        """Give back all that lies on the device; held blocks stay in host memory."""
        leaving = self.resident
        self._ready.clear()
        self._encoded.clear()
        if leaving:
            self.tell_residents(came=(), left=leaving)


def set_resident(
    tiers: Sequence[Tiers], wanted: Sequence[Collection[int]], on_block: Callable[[int], None] | None
) -> None:
    """Hold exactly these blocks on each of several devices, whose transfers the first one's leads: a block that comes
    is read once. `on_block` is called before each that comes to any of them, and may raise."""
    first, before = tiers[0], [one.resident for one in tiers]
    left = [one.leave(indices) for one, indices in zip(tiers, wanted, strict=True)]
    missing = sorted({i for one, indices in zip(tiers, wanted, strict=True) for i in one.missing(indices)})
    if missing:
        first.hold_none_of({i for indices in wanted for i in indices})
    pace = Pace()
    try:
        for number, index in enumerate(missing):
            pace.keep(first.order, copies=True)
            if on_block is not None:
                on_block(index)
            first.expect(missing[number:])
            coming = [one for one, indices in zip(tiers, wanted, strict=True) if index in one.missing(indices)]
            first.bring(index, [(one, one.new_home(index)) for one in coming])
    finally:
        for one, old, gone in zip(tiers, before, left, strict=True):
            if missing:  # else perhaps in the middle of a run
                one.end_run()
            if missing or gone:
                one.tell_residents(came=one.resident - old, left=gone)
