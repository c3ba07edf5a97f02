"""A module's blocks that are streamed for a pass and stay nowhere: made from its files' tensors, visited, released."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import nn

from ..files.checkpoint import TensorEntry
from ..hardware import Hardware
from .block_layout import ProductOf, StoredBlock, WeightPatch, decoded, store_block
from .block_source import BlockSource, FileSource
from .pinned_memory import PinnedMemory
from .store import BlockStore
from .streamer import BlockStreamer, Waits
from .tiers import SlotModules

OnBlock = Callable[[int], None]


@dataclass(frozen=True)
class BlockFiles:
    """The tensors of a module's blocks in its files, and what stores of them are made with.

    entries: of each block, by the names of the parameters of `make_block()`, which returns an empty module and holds no
    reference to whoever owns the store. where: what a block is called in errors, before its number. product_of: as
    `store_block` has it.
    """

    entries: Sequence[Mapping[str, TensorEntry]]
    make_block: Callable[[], nn.Module]
    dtype: torch.dtype
    where: str
    source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource
    product_of: ProductOf = decoded
    shapes: Mapping[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        shapes = {name: tuple(p.shape) for name, p in self.make_block().named_parameters()}
        object.__setattr__(self, "shapes", shapes)

    def open(self, hardware: Hardware, host: PinnedMemory | None = None) -> BlockStore:
        """A store of the blocks; `host` as there. Reads nothing. Raises WrongModel for what is missing or of another
        shape, Unsupported for what the device cannot decode."""
        blocks = self._stored({})
        return BlockStore(blocks, self.source(blocks), self.make_block, hardware, host=host)

    def patch(self, stores: Sequence[BlockStore], patches: Mapping[tuple[int, str], WeightPatch]) -> None:
        """Between two runs: apply these, by block and parameter, and no others to what `stores` hand out."""
        blocks = self._stored(patches)
        for store in stores:
            store.replace(blocks, self.source(blocks))

    def _stored(self, patches: Mapping[tuple[int, str], WeightPatch]) -> list[StoredBlock]:
        return [
            store_block(
                self.shapes,
                entries,
                self.dtype,
                f"{self.where} {i}",
                [patches[i, name] for name in self.shapes if (i, name) in patches],
                product_of=self.product_of,
            )
            for i, entries in enumerate(self.entries)
        ]


class BlockBytes(TypedDict):
    """What blocks give to a footprint, whose fields have these names."""

    slot_bytes: int
    staging_bytes: int
    scratch_bytes: int
    decode_bytes: int
    decode_launches: int
    stored_bytes: int
    ring_bytes: int
    host: bool


class StreamedBlocks:
    """Visits the blocks of a store and counts what that took.

    Guarantees: after a visit, whichever way it ended, no block lies on the device, no host buffer and no file is left.
    """

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self.waits = Waits()

    def __len__(self) -> int:
        return len(self._store.blocks)

    @property
    def device(self) -> torch.device:
        return self._store.hardware.device

    @property
    def fetched_bytes(self) -> int:
        """Read so far."""
        return self._store.fetched_bytes

    @property
    def copied_bytes(self) -> int:
        """Copied from host memory to the device so far."""
        return self._store.copied_bytes

    @property
    def nbytes(self) -> BlockBytes:
        store = self._store
        return {
            "slot_bytes": store.slot_bytes,
            "staging_bytes": store.staging_bytes,
            "scratch_bytes": store.scratch_bytes,
            "decode_bytes": store.decode_cost.moved_bytes,
            "decode_launches": store.decode_cost.launches,
            "stored_bytes": store.raw_bytes,
            "ring_bytes": store.ring_bytes,
            "host": store.hardware.host_device,
        }

    @contextmanager
    def visit(
        self, slots: int, on_block: OnBlock | None = None, *, together_bytes: int | None = None
    ) -> Iterator[Iterator[tuple[int, nn.Module]]]:
        """`with blocks.visit(2) as visited: for index, block in visited: ...`: each block once, in order, valid until
        the next is asked for.

        `on_block` is called before each block with its index, and may raise. `together_bytes`: of the slots, as
        BlockStreamer has it.
        """
        try:
            with BlockStreamer(self._store, slots=slots, together_bytes=together_bytes) as streamer:
                visited = _announced(streamer, on_block)
                try:
                    yield visited
                    self.waits += streamer.waits
                finally:
                    visited.close()  # before the slots are given back: it returns the one that is in use
        finally:
            self._store.release()


class VisitsBlocks:
    """Base of whoever visits streamed blocks: what that took so far."""

    _blocks: StreamedBlocks

    @property
    def fetched_bytes(self) -> int:
        """Of blocks, read."""
        return self._blocks.fetched_bytes

    @property
    def copied_bytes(self) -> int:
        """Of blocks, copied from host memory to the device."""
        return self._blocks.copied_bytes

    @property
    def waits(self) -> Waits:
        """What the visits have waited."""
        return self._blocks.waits


def _announced(
    streamer: BlockStreamer[SlotModules, nn.Module], on_block: OnBlock | None
) -> Generator[tuple[int, nn.Module], None, None]:
    for index, block in streamer.visit():
        if on_block is not None:
            on_block(index)
        yield index, block
