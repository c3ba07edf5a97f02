"""A transformer's file part by part: what stays on the device, the blocks, what is computed beforehand. No weight."""

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from ..hardware import Hardware
from ..planning.footprint import TransformerFootprint
from ..streaming import (
    BlockSource,
    BlockStore,
    FileSource,
    HostMemory,
    StoredBlock,
    WeightPatch,
    read_params,
    store_block,
)
from .network import Network


class TransformerParts:
    """A network's tensors in stores, by where they are used.

    Holds no weight, and no file open. `footprint` is what a plan is made from.
    """

    def __init__(
        self,
        network: Network,
        *,
        dtype: torch.dtype,
        hardware: Hardware,
        others: Sequence[Hardware] = (),
        source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource,
    ) -> None:
        """`others`: further devices that blocks may stay on. `source` makes the blocks' source.

        Raises WrongModel, DamagedFile or MissingFile.
        """
        self.network = network
        self._dtype, self._hardware, self._source = dtype, hardware, source
        with torch.device("meta"):
            self._outside_shapes = _shapes(network.make_outside())
        self._block_shapes = _shapes(network.make_block())
        self._modulation_shapes = _shapes(network.make_modulation()) if network.make_modulation else {}
        host = HostMemory(hardware)

        def store(
            shapes: Mapping[str, tuple[int, ...]], make_module: Callable[[], nn.Module], on: Hardware = hardware
        ) -> BlockStore:
            blocks = self._stored(shapes, {})
            return BlockStore(blocks, source(blocks), make_module, on, host=host)

        self.store = store(self._block_shapes, network.make_block)
        self.annex_stores = [store(self._block_shapes, network.make_block, other) for other in others]
        self.modulation_store = (
            store(self._modulation_shapes, network.make_modulation) if network.make_modulation else None
        )

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Every weight's shape by its name in the whole model."""
        in_block = self._block_shapes | self._modulation_shapes
        names = {
            f"{self.network.block_prefix}{i}.{name}": shape
            for i in range(len(self.network.blocks))
            for name, shape in in_block.items()
        }
        return self._outside_shapes | names

    def patch(self, patches: Mapping[str, WeightPatch]) -> None:
        """From now on apply these to the weights of those names, and no others; between two runs."""
        for shapes, stores in (
            (self._block_shapes, [self.store, *self.annex_stores]),
            (self._modulation_shapes, [self.modulation_store] if self.modulation_store else []),
        ):
            for store in stores:
                blocks = self._stored(shapes, patches)
                store.replace(blocks, self._source(blocks))

    def _stored(self, shapes: Mapping[str, tuple[int, ...]], patches: Mapping[str, WeightPatch]) -> list[StoredBlock]:
        network = self.network
        return [
            store_block(
                shapes,
                entries,
                self._dtype,
                f"{network.where}, block {i}",
                [patches[full] for name in shapes if (full := f"{network.block_prefix}{i}.{name}") in patches],
            )
            for i, entries in enumerate(network.blocks)
        ]

    @property
    def footprint(self) -> TransformerFootprint:
        """What a plan is made from, the patches included."""
        store, modulation = self.store, self.modulation_store
        beforehand = {}
        if modulation is not None:
            beforehand = {
                "modulation_slot_bytes": modulation.slot_bytes,
                "modulation_stored_bytes": modulation.raw_bytes,
                "modulation_staging_bytes": modulation.staging_bytes,
                "modulation_scratch_bytes": modulation.scratch_bytes,
            }
        return self.network.make_footprint(
            blocks=len(self.network.blocks),
            slot_bytes=store.slot_bytes,
            stored_bytes=store.raw_bytes,
            staging_bytes=store.staging_bytes,
            native=all(block.native for block in store.blocks),
            outside_bytes=sum(prod(shape) for shape in self._outside_shapes.values()) * self._dtype.itemsize,
            inner_dim=self.network.inner_dim,
            element_bytes=self._dtype.itemsize,
            scratch_bytes=store.scratch_bytes,
            ring_bytes=store.ring_bytes + (modulation.ring_bytes if modulation else 0),
            host=self._hardware.host_device,
            **beforehand,
        )

    def read_outside(self, patches: Mapping[str, WeightPatch] | None = None) -> dict[str, Tensor]:
        """The weights outside the blocks, patched, on the host, by their names in the network's `make_outside`."""
        own = [patch for name, patch in (patches or {}).items() if name in self._outside_shapes]
        return read_params(
            self.network.outside, self._outside_shapes, self._dtype, self.network.where, self._source, own
        )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}
