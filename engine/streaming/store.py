"""The blocks of one model: those that stay on the device, and the way of the others from the file into a slot."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..hardware import Hardware
from .layout import StoredBlock, bind
from .order import Mark, StreamOrder
from .source import BlockSource

RING_BUFFERS = 2  # one is read into while the other is copied from
RING_LIMIT_BYTES = 1_200_000_000


class BlockStore:
    """Owns the resident blocks and the host ring; lends every other block to the slots of a BlockStreamer.

    A resident block whose stored bytes are the compute dtype's is its own slot. One in another format stays
    encoded, at its stored size, and is decoded into a slot at each visit.
    `make_block` returns an empty module (on the meta device) whose parameters are those of a StoredBlock.
    """

    def __init__(
        self,
        blocks: Sequence[StoredBlock],
        source: BlockSource,
        make_block: Callable[[], nn.Module],
        hardware: Hardware,
        *,
        ring_buffers: int = RING_BUFFERS,
    ) -> None:
        self.blocks = tuple(blocks)
        self.source = source
        self.hardware = hardware
        self.order = StreamOrder(hardware)
        self.fetched_blocks = 0
        self.fetched_bytes = 0
        self._make_block = make_block
        self._modules: dict[int, nn.Module] = {}
        self._encoded: dict[int, Tensor] = {}
        self._ring: list[tuple[Tensor, Mark]] = []
        self._staging: Tensor | None = None
        self._turn = -1
        self._ring_buffers = ring_buffers

    @property
    def slot_bytes(self) -> int:
        return max(block.slot.nbytes for block in self.blocks)

    @property
    def raw_bytes(self) -> int:
        return max(block.raw.nbytes for block in self.blocks)

    @property
    def _ring_count(self) -> int:
        fits = max(1, RING_LIMIT_BYTES // _pinned_bytes(self.raw_bytes))
        return min(self._ring_buffers, fits)

    @property
    def ring_bytes(self) -> int:
        """What the host ring takes when it is filled, as torch rounds page-locked memory up."""
        return self._ring_count * _pinned_bytes(self.raw_bytes)

    @property
    def staging_bytes(self) -> int:
        """Room on the device for the largest parameter that has to be decoded, 0 where none has or none is copied."""
        if self.hardware.host_device:
            return 0
        return max((block.staging_bytes for block in self.blocks if not block.native), default=0)

    @property
    def scratch_bytes(self) -> int:
        """What decoding a block allocates on the device for a moment, 0 where none has to be decoded."""
        return max((block.scratch_bytes for block in self.blocks if not block.native), default=0)

    @property
    def resident(self) -> frozenset[int]:
        return frozenset(self._modules) | frozenset(self._encoded)

    @property
    def resident_bytes(self) -> int:
        native = sum(self.blocks[i].slot.nbytes for i in self._modules)
        return native + sum(self.blocks[i].raw.nbytes for i in self._encoded)

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

    def set_resident(self, indices: Iterable[int]) -> None:
        """Hold exactly these blocks on the device; what is already there is not read again."""
        wanted = set(indices)
        for index in self.resident - wanted:
            self._modules.pop(index, None)
            self._encoded.pop(index, None)
        for index in sorted(wanted - self.resident):
            block = self.blocks[index]
            if block.native:
                buffer, module = self.new_slot()
                self.order.after_compute()
                self.fetch_into(index, buffer)
                self._modules[index] = module
            else:
                with torch.inference_mode(False):
                    encoded = torch.empty(block.raw.nbytes, dtype=torch.uint8, device=self.hardware.device)
                self.order.after_compute()
                self._read_raw(index, encoded)
                self._encoded[index] = encoded
        self.order.finish()
        self.source.close()

    def fetch_into(self, index: int, slot: Tensor) -> None:
        """Bring block `index` into a slot's buffer: read, copy on the copy stream, decode. Any one thread at a time."""
        block = self.blocks[index]
        with torch.no_grad(), self.order.copying():
            encoded = self._encoded.get(index)
            if encoded is not None:
                block.decode(encoded, slot)
            elif block.native:
                self._read_raw(index, slot)
            elif self.hardware.host_device:
                raw, _ = self._ring_buffer()
                self._read(index, raw)
                block.decode(raw, slot)
            else:
                raw, copied = self._ring_buffer()
                self.order.host_waits(copied)
                self._read(index, raw)
                block.decode(raw, slot, self._staging_buffer())
                self.order.record_copy(copied)

    def release(self) -> None:
        """Give back everything: resident blocks, ring, staging and open files."""
        self.order.finish()
        self._modules.clear()
        self._encoded.clear()
        self._ring.clear()
        self._staging = None
        self.source.close()

    def release_staging(self) -> None:
        """Give back what only a run needs on the device."""
        self._staging = None

    def _read_raw(self, index: int, out: Tensor) -> None:
        """The block's raw bytes into `out` on the device, on the copy stream."""
        nbytes = self.blocks[index].raw.nbytes
        if self.hardware.host_device:
            self._read(index, out)
            return
        host, copied = self._ring_buffer()
        self.order.host_waits(copied)
        self._read(index, host)
        with self.order.copying():
            out[:nbytes].copy_(host[:nbytes], non_blocking=self.hardware.streams)
        self.order.record_copy(copied)

    def _read(self, index: int, host: Tensor) -> None:
        self.source.read(index, host)
        self.fetched_blocks += 1
        self.fetched_bytes += sum(param.nbytes for param in self.blocks[index].params)

    def _ring_buffer(self) -> tuple[Tensor, Mark]:
        if len(self._ring) < self._ring_count:
            with torch.inference_mode(False):
                buffer = torch.empty(self.raw_bytes, dtype=torch.uint8, pin_memory=self.hardware.pinned)
            self._ring.append((buffer, self.order.mark()))
        self._turn += 1
        return self._ring[self._turn % len(self._ring)]

    def _staging_buffer(self) -> Tensor:
        if self._staging is None:
            with torch.inference_mode(False):
                self._staging = torch.empty(self.staging_bytes, dtype=torch.uint8, device=self.hardware.device)
        return self._staging


def _pinned_bytes(nbytes: int) -> int:
    """torch's allocator of page-locked memory rounds every allocation up to a power of two."""
    return 1 << (nbytes - 1).bit_length()
