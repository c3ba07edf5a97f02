"""A transformer's file part by part: what stays on the device, the blocks, what is computed beforehand. No weight."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..compute.attention import Attention, kernel_of, kernel_of_all
from ..compute.attention_kernels import AttentionKernel
from ..compute.half_products import activations_dtype
from ..compute.linear_choice import DECODED, LinearChoice
from ..compute.linear_layers import LinearLayers
from ..compute.stored_products import StoredProduct, layer_scratch
from ..hardware import Hardware
from ..planning.footprint import TransformerFootprint
from ..streaming import (
    BlockFiles,
    BlockSource,
    BlockStore,
    FileSource,
    PinnedMemory,
    StoredBlock,
    WeightPatch,
    read_params,
)
from .layer_rows import OtherNames, other_names
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
        linear: LinearChoice = DECODED,
    ) -> None:
        """`dtype`: of weights and products; where it is fp16, activations are in fp32 (`compute.half_products`).
        `others`: further devices that blocks may stay on. `source` makes the blocks' source. linear: what the blocks'
        linear layers compute on.

        Raises WrongModel, DamagedFile or MissingFile.
        """
        self.network = network = network if activations_dtype(dtype) == dtype else network.in_half()
        self._dtype, self._hardware, self._source = dtype, hardware, source
        self._devices = (hardware, *others)
        self.attending: Attention | None = None  # None: by what torch has on each device
        with torch.device("meta"):
            self._outside_shapes = _shapes(network.make_outside())
        host = PinnedMemory(hardware)
        self.linear = linear
        block_files = self._files(network.make_block, linear)
        self.store = block_files.open(hardware, host)
        self.secondary_stores = [block_files.open(other, host) for other in others]
        self.modulation_store: BlockStore | None = None
        self._stores_of = [(block_files, [self.store, *self.secondary_stores])]
        if network.make_modulation is not None:
            modulation_files = self._files(network.make_modulation, linear)
            self.modulation_store = modulation_files.open(hardware, host)
            self._stores_of.append((modulation_files, [self.modulation_store]))

    def _files(self, make_part: Callable[[], nn.Module], linear: LinearChoice) -> BlockFiles:
        network, where = self.network, f"{self.network.where}, block"
        return BlockFiles(network.blocks, make_part, self._dtype, where, self._source, linear.product_of)

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Every weight's shape by its name in the whole model."""
        names = {
            f"{self.network.block_prefix}{i}.{name}": shape
            for i in range(len(self.network.blocks))
            for files, _ in self._stores_of
            for name, shape in files.shapes.items()
        }
        return self._outside_shapes | names

    @property
    def weight_format(self) -> str:
        """The format of the blocks' largest weights, as a name of `formats.CODECS`."""
        return max(self.store.blocks[0].params, key=lambda param: param.nbytes).codec

    @property
    def other_names(self) -> OtherNames:
        """Of layers that the file holds joined or apart, and other files in the other way."""
        return other_names(self.weights, self.network.joined_layers)

    def patch(self, patches: Mapping[str, WeightPatch]) -> None:
        """From now on apply these to the weights of those names, and no others; between two runs."""
        for files, stores in self._stores_of:
            in_blocks = {
                (i, name): patches[full].named(name)
                for i in range(len(self.network.blocks))
                for name in files.shapes
                if (full := f"{self.network.block_prefix}{i}.{name}") in patches
            }
            files.patch(stores, in_blocks)

    def attention_on(self, hardware: Hardware) -> Attention:
        """By which blocks attend there."""
        return self.attending or Attention(kernel_of(hardware, self._dtype))

    @property
    def attention(self) -> AttentionKernel:
        """On any of the devices: what is planned for."""
        return self.attending.kernel if self.attending else self.native_attention

    @property
    def native_attention(self) -> AttentionKernel:
        """torch's own on any of the devices."""
        return kernel_of_all(self._devices, self._dtype)

    @property
    def footprint(self) -> TransformerFootprint:
        """What a plan is made from, the patches included."""
        store, modulation = self.store, self.modulation_store
        beforehand: dict[str, Any] = {}
        if modulation is not None:
            beforehand = {
                "modulation_slot_bytes": modulation.slot_bytes,
                "modulation_stored_bytes": modulation.raw_bytes,
                "modulation_staging_bytes": modulation.staging_bytes,
                "modulation_scratch_bytes": modulation.scratch_bytes,
                "modulation_decode_bytes": modulation.decode_cost.moved_bytes,
                "modulation_decode_launches": modulation.decode_cost.launches,
                "modulation_linear": self._linear_layers(*self._stores_of[1]),
            }
        return self.network.make_footprint(
            blocks=len(self.network.blocks),
            slot_bytes=store.slot_bytes,
            stored_bytes=store.raw_bytes,
            staging_bytes=store.staging_bytes,
            native=all(block.native for block in store.blocks),
            outside_bytes=sum(prod(shape) for shape in self._outside_shapes.values()) * self._dtype.itemsize,
            inner_dim=self.network.inner_dim,
            element_bytes=activations_dtype(self._dtype).itemsize,
            in_half=activations_dtype(self._dtype) != self._dtype,
            scratch_bytes=store.scratch_bytes,
            decode_bytes=store.decode_cost.moved_bytes,
            decode_launches=store.decode_cost.launches,
            ring_bytes=store.ring_bytes + (modulation.ring_bytes if modulation else 0),
            host=self._hardware.host_device,
            attention=self.attention,
            linear=self._linear_layers(*self._stores_of[0]),
            **beforehand,
        )

    @property
    def stored_product(self) -> StoredProduct | None:
        """By which the largest weights are multiplied as they are stored; None where they are decoded."""
        block, shapes = self.store.blocks[0], self._stores_of[0][0].shapes
        largest = max(shapes, key=lambda name: prod(shapes[name]))
        layer = dict(block.computed).get(largest)
        return None if layer is None else layer.product

    def _linear_layers(self, files: BlockFiles, stores: Sequence[BlockStore]) -> LinearLayers:
        """Those of the blocks that compute on stored weights."""
        shapes, size = files.shapes, activations_dtype(self._dtype).itemsize
        found = {(layer.product, shapes[name]) for block in stores[0].blocks for name, layer in block.computed}
        return LinearLayers.of(
            (f"{product.name} by comfy-kitchen {product.backend}" for product, _ in found),
            (layer_scratch(product, columns, rows, size) for product, (rows, columns) in found),
            of_all_tokens=any(product.of_all_tokens for product, _ in found),
        )

    def read_outside(self, patches: Mapping[str, WeightPatch] | None = None) -> dict[str, Tensor]:
        """The weights outside the blocks, patched, on the host, by their names in the network's `make_outside`."""
        own = [patch for name, patch in (patches or {}).items() if name in self._outside_shapes]
        return read_params(
            self.network.outside, self._outside_shapes, self._dtype, self.network.where, self._source, own
        )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}
