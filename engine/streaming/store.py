"""The blocks of one model in three tiers: on the device, in host memory, in the file; and the way into a slot."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from ..files.checkpoint import TensorEntry
from ..formats import FORMATS
from ..hardware import Hardware
from ..log import logger
from ..out_of_memory import reason
from .block_layout import StoredBlock, bind
from .block_source import BlockSource
from .pinned_memory import HostBuffer, HostMemory
from .streams import Mark, StreamOrder

# a block passes through the ring in pieces: large enough for a disk's full speed, and several are read at once
PIECE_BYTES = 32 * 1024**2
RING_PIECES = 4


class BlockStore:
    """Owns the resident and the held blocks, and lends every block to the slots of a BlockStreamer.

    A resident block (on the device) whose stored bytes are the compute dtype's is its own slot. One in another
    format stays encoded, at its stored size, and is decoded into a slot at each visit. A held block lies in host
    memory as it is stored, from its first visit on. All others are read from their file at each visit.
    `make_block` returns an empty module (on the meta device) whose parameters are those of a StoredBlock.
    """

    def __init__(
        self,
        blocks: Sequence[StoredBlock],
        source: BlockSource,
        make_block: Callable[[], nn.Module],
        hardware: Hardware,
        *,
        host: HostMemory | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self.blocks = tuple(blocks)
        require_decodable((part for block in self.blocks for part in block.parts), hardware)
        self.source = source
        self.hardware = hardware
        self.order = StreamOrder(hardware)
        self.fetched_blocks = 0
        self.fetched_bytes = 0
        self.copied_bytes = 0
        self._make_block = make_block
        self._host = host or HostMemory(hardware)
        self._modules: dict[int, nn.Module] = {}
        self._encoded: dict[int, Tensor] = {}
        self._to_hold: frozenset[int] = frozenset()
        self._held: dict[int, HostBuffer] = {}
        self._staging: Tensor | None = None
        self._scratch: Tensor | None = None
        self._ring: list[tuple[HostBuffer, Mark]] = []
        self._turn = -1
        self._readers: ThreadPoolExecutor | None = None
        # between the thread that fetches ahead and whoever takes blocks from the device; piece readers need none
        self._lock = threading.RLock()
        self._most_piece_bytes = piece_bytes

    @property
    def slot_bytes(self) -> int:
        return max(block.slot.nbytes for block in self.blocks)

    @property
    def raw_bytes(self) -> int:
        return max(block.raw.nbytes for block in self.blocks)

    @property
    def ring_bytes(self) -> int:
        """Host memory that blocks pass through on their way from the file to the device."""
        return 0 if self.hardware.host_device else RING_PIECES * self._piece_bytes

    @property
    def staging_bytes(self) -> int:
        """Room on the device for what has to be decoded or added, 0 where nothing has."""
        return self._staged_bytes + self._scratched_bytes

    @property
    def scratch_bytes(self) -> int:
        """What decoding a block allocates on the device for a moment, 0 where none has to be decoded."""
        return max(block.scratch_bytes for block in self.blocks)

    @property
    def resident(self) -> frozenset[int]:
        return frozenset(self._modules) | frozenset(self._encoded)

    @property
    def resident_bytes(self) -> int:
        native = sum(self.blocks[i].slot.nbytes for i in self._modules)
        return native + sum(self.blocks[i].raw.nbytes for i in self._encoded)

    @property
    def held(self) -> frozenset[int]:
        """Blocks whose bytes lie in host memory by now."""
        return frozenset(self._held)

    @property
    def held_bytes(self) -> int:
        return sum(buffer.data.nbytes for buffer in self._held.values())

    @property
    def pinned_bytes(self) -> int:
        """Of the held bytes, those that are page-locked."""
        return sum(buffer.data.nbytes for buffer in self._held.values() if buffer.pinned)

    def module(self, index: int) -> nn.Module | None:
        """The block's own module where it is resident and needs no decoding."""
        return self._modules.get(index)

    def new_slot(self) -> tuple[Tensor, nn.Module]:
        """A buffer on the device, large enough for any block, and a module whose parameters lie in it."""
        # nodes run in inference mode, and a reader thread may not write to what was made there
        with torch.inference_mode(False):
            buffer = torch.empty(self.slot_bytes, dtype=torch.uint8, device=self.hardware.device)
            module = self._make_block()
            bind(module, self.blocks[0].slot.views(buffer))
        return buffer, module

    def set_resident(self, indices: Iterable[int], *, on_block: Callable[[int], None] | None = None) -> None:
        """Hold exactly these blocks on the device; what is already there is not read again.

        `on_block` is called before each block that is brought, with its index, and may raise.
        """
        wanted = set(indices)
        with self._lock:
            if self.resident - wanted:
                self.order.finish()  # an encoded block may be read on the copy stream
            for index in self.resident - wanted:
                self._modules.pop(index, None)
                self._encoded.pop(index, None)
            missing = sorted(wanted - self.resident)
            if not missing:
                return  # perhaps in the middle of a run
            self._to_hold -= wanted
            try:
                for index in missing:
                    if on_block is not None:
                        on_block(index)
                    self._load(index)
            finally:
                self.end_run()

    def _load(self, index: int) -> None:
        block = self.blocks[index]
        if block.native:
            buffer, module = self.new_slot()
            self.order.after_compute()
            self.fetch_into(index, buffer)
            self._modules[index] = module
            return
        buffer = self._new_buffer(block.raw.nbytes)
        self.order.after_compute()
        with torch.no_grad(), self.order.copying():
            self._bring(index, 0, buffer)
        if index not in self._held:
            self._count_file(index)
        self._encoded[index] = buffer

    def replace(self, blocks: Sequence[StoredBlock], source: BlockSource) -> None:
        """Change how blocks are stored, between two runs. What lies on the device or in host memory stays as far as it
        is the same."""
        require_decodable((part for block in blocks for part in block.parts), self.hardware)
        with self._lock:
            self.end_run()
            for index, (old, new) in enumerate(zip(self.blocks, blocks, strict=True)):
                if old.parts != new.parts:
                    self._encoded.pop(index, None)
                    self._held.pop(index, None)
                if old.parts != new.parts or old.patches != new.patches:
                    self._modules.pop(index, None)
            self.blocks, self.source = tuple(blocks), source

    def set_held(self, indices: Iterable[int]) -> None:
        """Keep exactly these blocks in host memory, each from its next visit on; gives back all others."""
        with self._lock:
            self._to_hold = frozenset(indices)
            if self.held - self._to_hold:
                self.order.finish()
            for index in self.held - self._to_hold:
                del self._held[index]
            self._host.ask_again()

    def reads_file(self, index: int) -> bool:
        """Whether the next fetch of a block goes to its file."""
        return index not in self._held and index not in self._encoded

    def fetch_into(self, index: int, slot: Tensor) -> None:
        """Bring block `index` into a slot's buffer: read, copy on the copy stream, decode. Any one thread at a time."""
        with self._lock, torch.no_grad(), self.order.copying():
            block = self.blocks[index]
            scratch = self._scratch_buffer()
            encoded = self._encoded.get(index)
            if encoded is not None:
                for group in block.groups:
                    group.decode(encoded, slot, scratch)
                return
            if index in self._to_hold and index not in self._held:
                self._hold(index)
            if block.native:
                self._bring(index, 0, slot[: block.slot.nbytes])
            for group in block.groups:
                staging = self._staging_buffer()
                self._bring(index, group.start, staging[: group.end - group.start])
                group.decode(staging, slot, scratch, base=group.start)
            if index not in self._held:
                self._count_file(index)

    def end_run(self) -> None:
        """Give back what only a run needs: staging, ring, reader threads and open files."""
        with self._lock:
            self.order.finish()
            if self._readers is not None:
                self._readers.shutdown(wait=True)
                self._readers = None
            self._staging = self._scratch = None
            self._ring.clear()
            self.source.close()

    def release(self) -> None:
        """Give back what a run needs and all that lies on the device; held blocks stay in host memory."""
        with self._lock:
            self.end_run()
            self._modules.clear()
            self._encoded.clear()

    def _bring(self, index: int, start: int, out: Tensor) -> None:
        """Raw bytes of a block, from `start` on, into `out` on the device; on the current stream."""
        held = self._held.get(index)
        if self.hardware.host_device:
            if held is None:
                self.source.read(index, out, start)
            else:
                out.copy_(held.data[start : start + len(out)])
            return
        self.copied_bytes += len(out)
        if held is not None and (held.pinned or not self.hardware.pinned):
            out.copy_(held.data[start : start + len(out)], non_blocking=held.pinned)
            return
        self._bring_through_ring(index, start, out)

    def _bring_through_ring(self, index: int, start: int, out: Tensor) -> None:
        pending: deque[tuple[Tensor, HostBuffer, Mark, Future[None]]] = deque()
        try:
            for begin in range(0, len(out), self._piece_bytes):
                if len(pending) == RING_PIECES:
                    self._copy_piece(*pending.popleft())
                buffer, copied = self._ring_buffer()
                self.order.host_waits(copied)
                piece = out[begin : begin + self._piece_bytes]
                read_into = buffer.data[: len(piece)]
                pending.append((piece, buffer, copied, self._start(index, start + begin, read_into)))
            while pending:
                self._copy_piece(*pending.popleft())
        finally:
            while pending:  # after an error: nobody may write to a buffer that is given back
                pending.popleft()[-1].exception()

    def _copy_piece(self, piece: Tensor, buffer: HostBuffer, copied: Mark, read: "Future[None]") -> None:
        try:
            read.result()
        finally:
            del read  # it holds the error, whose traceback holds this frame: a circle would keep the buffers alive
        piece.copy_(buffer.data[: len(piece)], non_blocking=buffer.pinned)
        self.order.record_copy(copied)

    def _hold(self, index: int) -> None:
        """Read a block into host memory of its own. Where the system has none, no further block is held."""
        try:
            buffer = self._host.take(self.blocks[index].raw.nbytes)
        except (RuntimeError, MemoryError) as error:
            self._to_hold = self.held
            logger.warning(
                "There is no RAM for more than %d held blocks (%s); the others are read from the file at every step.",
                len(self._held),
                reason(error),
            )
            return
        pieces = enumerate(buffer.data.split(self._piece_bytes))
        reads = [self._start(index, i * self._piece_bytes, piece) for i, piece in pieces]
        wait(reads)
        while reads:
            reads.pop().result()
        self._count_file(index)
        self._held[index] = buffer

    def _start(self, index: int, start: int, out: Tensor) -> "Future[None]":
        """Read from the file, or from held memory that the device cannot copy from, in a reader thread if there are
        any."""
        if self.hardware.prefetch:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(RING_PIECES, thread_name_prefix="qwen-block-reader-piece")
            return self._readers.submit(self._read, index, start, out)
        future: Future[None] = Future()
        self._read(index, start, out)
        future.set_result(None)
        return future

    def _read(self, index: int, start: int, out: Tensor) -> None:
        held = self._held.get(index)
        if held is None:
            self.source.read(index, out, start)
        else:
            out.copy_(held.data[start : start + len(out)])

    def _count_file(self, index: int) -> None:
        self.fetched_blocks += 1
        self.fetched_bytes += self.blocks[index].nbytes

    def _ring_buffer(self) -> tuple[HostBuffer, Mark]:
        if len(self._ring) < RING_PIECES:
            self._ring.append((self._host.take(self._piece_bytes), self.order.mark()))
        self._turn = (self._turn + 1) % len(self._ring)
        return self._ring[self._turn]

    @property
    def _piece_bytes(self) -> int:
        return min(self._most_piece_bytes, self.raw_bytes)

    @property
    def _staged_bytes(self) -> int:
        return max(block.staging_bytes for block in self.blocks)

    @property
    def _scratched_bytes(self) -> int:
        return max(block.patch_scratch_bytes for block in self.blocks)

    def _staging_buffer(self) -> Tensor:
        if self._staging is None:
            self._staging = self._new_buffer(self._staged_bytes)
        return self._staging

    def _scratch_buffer(self) -> Tensor:
        if self._scratch is None:
            self._scratch = self._new_buffer(self._scratched_bytes)
        return self._scratch

    def _new_buffer(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.hardware.device)


def require_decodable(parts: Iterable[TensorEntry], hardware: Hardware) -> None:
    """Raise Unsupported for weights, and parts of LoRAs, that the device cannot bring to another dtype."""
    if hardware.decodes_fp8:
        return
    for part in parts:
        if FORMATS.casts_fp8(part):
            raise Unsupported(
                f"{part.file} holds weights in {part.dtype}, which cannot be decoded on {hardware.device}."
                "\n\nWhat to do: use a GGUF, bf16 or int8 file, or choose the CPU as its device in the loader."
            )
