"""The blocks of one model in three tiers: on the device, in host memory, in the file; and the way into a slot."""

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from ..errors import Unsupported
from ..files.checkpoint import TensorEntry
from ..formats import FORMATS
from ..hardware import Hardware
from ..planning.forecast import Throughput
from .block_layout import StoredBlock
from .block_source import BlockSource
from .decode_costs import DecodeCost
from .kept_tensors import KeptTensors
from .pinned_memory import HostBuffer, PinnedMemory
from .streams import StreamOrder
from .tiers import SlotModules, Tiers, set_resident
from .transfer import BlockSizes, Target, Transfer


class BlockStore:
    """Owns the resident and the held blocks, and lends every block to the slots of a BlockStreamer.

    A resident block (on the device) whose stored bytes are the compute dtype's is its own slot. One in another
    format stays encoded, at its stored size, and is decoded into a slot at each visit. A held block lies in host
    memory as it is stored, from its first visit on. All others are read from their file at each visit.
    `make_block` returns an empty module (on the meta device) whose parameters are those of a StoredBlock. `kept`: what
    blocks made, for later visits; it counts as resident and held.

    Where blocks lie is kept by `Tiers`, how they get there by `Transfer`; their lock is here.
    """

    def __init__(
        self,
        blocks: Sequence[StoredBlock],
        source: BlockSource,
        make_block: Callable[[], nn.Module],
        hardware: Hardware,
        *,
        host: PinnedMemory | None = None,
    ) -> None:
        """`host`: of several stores whose page-locked memory has one limit; the store's own if not given."""
        require_decodable((part for block in blocks for part in block.parts), hardware)
        self.hardware = hardware
        self.order = StreamOrder(hardware)
        self._host = host or PinnedMemory(hardware)
        self._transfer = transfer = Transfer(source, self._sizes(blocks), self.order, hardware, self._host)
        self._tiers = Tiers(blocks, make_block, self.order, self._transfer)
        self.kept = KeptTensors(self.order, hardware, self._host, lambda: transfer.untaken_bytes)
        # between the thread that fetches ahead and whoever takes blocks from the device; piece readers need none
        self._lock = threading.RLock()

    @property
    def blocks(self) -> tuple[StoredBlock, ...]:
        return self._tiers.blocks

    @property
    def source(self) -> BlockSource:
        return self._transfer.source

    @property
    def slot_bytes(self) -> int:
        return self._transfer.sizes.slot_bytes

    @property
    def raw_bytes(self) -> int:
        return self._transfer.sizes.raw_bytes

    @property
    def ring_bytes(self) -> int:
        """Host memory that blocks pass through on their way from the file to the device, at the least."""
        return 0 if self.hardware.host_device else self._transfer.sizes.ring_bytes

    @property
    def piece_bytes(self) -> int:
        """Of one of the ring's pieces; 0 where there is none."""
        return 0 if self.hardware.host_device else self._transfer.sizes.piece_bytes

    @property
    def ring_pieces(self) -> int:
        """How many of them there may be."""
        return self._transfer.ring_pieces

    @ring_pieces.setter
    def ring_pieces(self, pieces: int) -> None:
        with self._lock:
            self._transfer.ring_pieces = pieces

    @property
    def staging_bytes(self) -> int:
        """Room on the device for what has to be decoded or added, 0 where nothing has."""
        return self._transfer.sizes.staging_bytes

    @property
    def scratch_bytes(self) -> int:
        """What decoding and changing a block takes on the device beside that, allocated ahead but for what patches
        allocate by themselves; 0 where nothing is decoded or changed."""
        return self._transfer.sizes.scratch_bytes + self._transfer.sizes.allocated_bytes

    @property
    def decode_cost(self) -> DecodeCost:
        """Of one visit of a block, in the mean."""
        return self._transfer.sizes.decode_cost

    @property
    def fetched_blocks(self) -> int:
        """Blocks read from the file so far."""
        return self._transfer.fetched_blocks

    @property
    def fetched_bytes(self) -> int:
        return self._transfer.fetched_bytes

    @property
    def copied_bytes(self) -> int:
        """From host memory to the device so far."""
        return self._transfer.copied_bytes + self.kept.copied_bytes

    @property
    def read(self) -> Throughput:
        """From the file, and in what time."""
        return self._transfer.clock.read

    @property
    def copied(self) -> Throughput:
        """To the device, and in what time; what it is not done with yet is not counted."""
        return self._transfer.clock.copied

    @property
    def resident(self) -> frozenset[int]:
        return self._tiers.resident

    @property
    def resident_bytes(self) -> int:
        return self._tiers.resident_bytes + self.kept.resident_bytes

    @property
    def held(self) -> frozenset[int]:
        """Blocks whose bytes lie in host memory by now."""
        return self._tiers.held

    @property
    def held_bytes(self) -> int:
        return self._tiers.held_bytes + self.kept.held_bytes

    @property
    def pinned_bytes(self) -> int:
        """Of the held bytes, those that are page-locked."""
        return self._tiers.pinned_bytes + self.kept.pinned_bytes

    def _sizes(self, blocks: Sequence[StoredBlock]) -> BlockSizes:
        return BlockSizes(blocks, on_host=self.hardware.device.type == "cpu")

    def module(self, index: int) -> nn.Module | None:
        """The block's own module where it is resident and needs no decoding."""
        return self._tiers.module(index)

    def reads_file(self, index: int) -> bool:
        """Whether the next fetch of a block goes to its file."""
        return self._tiers.reads_file(index)

    def new_slots(self, count: int = 1, least_bytes: int = 0) -> list[SlotModules]:
        """Buffers on the device in one allocation of `least_bytes` or more, each large enough for any block."""
        return self._tiers.new_slots(count, least_bytes)

    def module_in(self, slot: SlotModules, index: int) -> nn.Module:
        """Of block `index`, whose bytes lie in the slot."""
        return self._tiers.module_in(slot, index)

    def make_decoding_room(self, indices: Collection[int]) -> None:
        """Take from the device, on the stream that is current, what these blocks are decoded in; until `end_run`."""
        with self._lock:
            staging = any(self._tiers.encoded(i) is None and not self.blocks[i].native for i in indices)
            self._transfer.make_decoding_room(staging=staging)

    def set_resident(self, indices: Iterable[int], *, on_block: Callable[[int], None] | None = None) -> None:
        """Hold exactly these blocks on the device; what is already there is not read again.

        `on_block` is called before each block that is brought, with its index, and may raise.
        """
        with self._lock:
            self._tiers.set_resident(indices, on_block)

    def set_held(self, indices: Iterable[int]) -> None:
        """Keep exactly these blocks in host memory, each from its next visit on; gives back all others."""
        with self._lock:
            self._tiers.set_held(indices)
            self._host.ask_again()

    def leave_host(self) -> None:
        """Give back all that is held; blocks are read again when their turn comes, what they made is made again."""
        self.set_held(())
        self.kept.release_host()

    def replace(self, blocks: Sequence[StoredBlock], source: BlockSource) -> None:
        """Change how blocks are stored, between two runs. What lies on the device or in host memory stays as far as it
        is the same."""
        require_decodable((part for block in blocks for part in block.parts), self.hardware)
        with self._lock:
            self._transfer.end_run()
            self._tiers.replace(blocks)
            self._transfer.replace(source, self._sizes(blocks))

    def fetch_into(self, index: int, slot: SlotModules, ahead: Sequence[int] = ()) -> None:
        """Bring block `index` into a slot: read, copy on the copy stream, decode. Any one thread at a time.

        `ahead`: the blocks that will be wanted next, in their order; they are read ahead as far as the ring has room.
        """
        with self._lock:
            coming = [i for i in (index, *ahead) if self._tiers.encoded(i) is None]
            self.fetch_for([(self, slot)], index, coming)

    def fetch_for(self, slots: Sequence[tuple["BlockStore", SlotModules]], index: int, coming: Sequence[int]) -> None:
        """The same for slots of this store and of those that it leads, whose locks are held. `coming`: which blocks
        have to be brought to any of them next, from this one on."""
        with self._lock, torch.no_grad():
            self._tiers.expect(coming)
            targets = []
            for store, slot in slots:
                block, encoded = store.blocks[index], store._tiers.encoded(index)
                if encoded is not None:
                    store._transfer.decode(block, encoded, slot.buffer)
                else:
                    targets.append(Target(store._transfer, block, slot.buffer))
            if targets:
                self._transfer.fill(index, self._tiers.held_of(index), targets)
                self._tiers.hold(index)

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Of where blocks lie."""
        return self._lock

    def lacks(self, index: int) -> bool:
        """Whether the block's bytes have to be brought to the device before it can be used."""
        return not self._tiers.lies_there(index)

    def lead(self, others: Sequence["BlockStore"]) -> None:
        """From now on read for these, too, and hold for them what is held, until it is called again; between two
        runs."""
        with self._lock:
            self._transfer.lead([other._transfer for other in others])

    def set_resident_beside(
        self, others: Sequence["BlockStore"], wanted: Sequence[Collection[int]], on_block: Callable[[int], None] | None
    ) -> None:
        """As `set_resident`, of this store and of the `others` that it leads: what comes to several is read once."""
        set_resident([self._tiers, *(other._tiers for other in others)], wanted, on_block)

    def take_host_memory(self, nbytes: int) -> HostBuffer:
        """For what is copied to the device or from it beside the blocks: page-locked within the same limit."""
        return self._host.take(nbytes)

    def end_run(self) -> None:
        """Give back what only a run needs: staging, ring, reader threads and open files."""
        with self._lock:
            self._transfer.end_run()
            self.kept.end_run()

    def release(self) -> None:
        """Give back what a run needs and all that lies on the device; held blocks stay in host memory."""
        with self._lock:
            self._transfer.end_run()
            self._tiers.release()
            self.kept.release()


def require_decodable(parts: Iterable[TensorEntry], hardware: Hardware) -> None:
    """Raise Unsupported for weights, and parts of LoRAs, that the device cannot bring to another dtype."""
    if hardware.decodes_fp8:
        return
    for part in parts:
        if FORMATS.casts_fp8(part):
            raise Unsupported(
                "{file} holds weights in {dtype}, which cannot be decoded on {device}.\n\nWhat to do: use a GGUF, "
                "bf16 or int8 file, or choose the CPU as its device in the loader.",
                code="format.cannot_decode_there",
                file=part.file,
                dtype=part.dtype,
                device=hardware.device,
            )
