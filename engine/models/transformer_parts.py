"""A transformer's file part by part: what stays on the device, the blocks, what is computed beforehand. No weight."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..compute.attention import Attention, kernel_of, kernel_of_all
from ..compute.attention_kernels import AttentionKernel
from ..compute.half_products import activations_dtype
from ..compute.linear_choice import DECODED, LinearChoice
from ..compute.linear_layers import LinearLayers
from ..compute.stored_linear import StoredLinear, compute_as_stored, part_name
from ..compute.stored_products import StoredProduct, layer_scratch
from ..formats import StoredParam
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
    bind,
    read_block,
    require_decodable,
    store_block,
)
from .layer_rows import OtherNames, other_names
from .network import Network


@dataclass(frozen=True)
class OutsideWeights:
    """Those outside the blocks, by their names in the network's `make_outside`, on the host: decoded, but for layers
    that compute on them as they are stored."""

    block: StoredBlock
    tensors: Mapping[str, Tensor]

    def put_into(self, outside: nn.Module, make_outside: Callable[[], nn.Module]) -> None:
        """In the place of those it has, and of their layers."""
        stored = [name for name, layer in outside.named_modules() if isinstance(layer, StoredLinear)]
        anew = make_outside() if stored else outside
        for name in stored:
            owner, _, attribute = name.rpartition(".")
            outside.get_submodule(owner)._modules[attribute] = anew.get_submodule(name)
        bind(compute_as_stored(outside, dict(self.block.computed)), self.tensors)


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
        `others`: further devices that blocks may stay on. `source` makes the blocks' source. linear: what linear
        layers compute on.

        Raises WrongModel, DamagedFile or MissingFile.
        """
        self.network = network = network if activations_dtype(dtype) == dtype else network.in_half()
        self._dtype, self._hardware, self._source = dtype, hardware, source
        self._devices = (hardware, *others)
        self.attending: Attention | None = None  # None: by what torch has on each device
        with torch.device("meta"):
            outside = network.make_outside()
        self._outside_shapes = {name: tuple(p.shape) for name, p in outside.named_parameters()}
        layers = (name for name, layer in outside.named_modules() if isinstance(layer, nn.Linear))
        self._outside_layers = frozenset(f"{name}.weight" for name in layers)
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
        self._outside = self._stored_outside({})

    def _files(self, make_part: Callable[[], nn.Module], linear: LinearChoice) -> BlockFiles:
        network, where = self.network, f"{self.network.where}, block"
        return BlockFiles(network.blocks, make_part, self._dtype, where, self._source, linear.product_of)

    @property
    def model(self) -> str:
        """What a person calls it."""
        return self.network.model

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
        """From now on apply these to the weights of those names, and no others; between two runs. Those outside the
        blocks are as `read_outside` makes them."""
        self._outside = self._stored_outside(patches)
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
                "modulation_linear": self._linear_layers(self._stores_of[1][0].shapes, modulation.blocks),
            }
        return self.network.make_footprint(
            blocks=len(self.network.blocks),
            slot_bytes=store.slot_bytes,
            stored_bytes=store.raw_bytes,
            staging_bytes=store.staging_bytes,
            native=all(block.native for block in store.blocks),
            outside_bytes=sum(item.nbytes for item in self._outside.slot.items),
            inner_dim=self.network.inner_dim,
            element_bytes=activations_dtype(self._dtype).itemsize,
            in_half=activations_dtype(self._dtype) != self._dtype,
            scratch_bytes=store.scratch_bytes,
            decode_bytes=store.decode_cost.moved_bytes,
            decode_launches=store.decode_cost.launches,
            ring_bytes=store.ring_bytes + (modulation.ring_bytes if modulation else 0),
            host=self._hardware.host_device,
            attention=self.attention,
            linear=self._linear_layers(self._stores_of[0][0].shapes, store.blocks),
            **beforehand,
        )

    @property
    def stored_product(self) -> StoredProduct | None:
        """By which the largest weights are multiplied as they are stored; None where they are decoded."""
        block, shapes = self.store.blocks[0], self._stores_of[0][0].shapes
        largest = max(shapes, key=lambda name: prod(shapes[name]))
        layer = dict(block.computed).get(largest)
        return None if layer is None else layer.product

    def _linear_layers(self, shapes: Mapping[str, tuple[int, ...]], blocks: Sequence[StoredBlock]) -> LinearLayers:
        """Those of blocks, and outside of them, that compute on stored weights."""
        size = activations_dtype(self._dtype).itemsize
        inside = {(layer.product, shapes[name]) for block in blocks for name, layer in block.computed}
        outside = {(layer.product, self._outside_shapes[name]) for name, layer in self._outside.computed}
        return LinearLayers.of(
            (f"{product.name} by comfy-kitchen {product.backend}" for product, _ in inside | outside),
            (layer_scratch(product, columns, rows, size) for product, (rows, columns) in inside | outside),
            of_all_tokens=any(product.of_all_tokens for product, _ in inside),
        )

    def read_outside(self, patches: Mapping[str, WeightPatch] | None = None) -> OutsideWeights:
        """With these patches, or none."""
        block = self._stored_outside(patches or {})
        return OutsideWeights(block, read_block(block, self._source))

    def _stored_outside(self, patches: Mapping[str, WeightPatch]) -> StoredBlock:
        network, shapes = self.network, self._outside_shapes
        own = [patch for name, patch in patches.items() if name in shapes]
        block = store_block(shapes, network.outside, self._dtype, network.where, own, product_of=self._product_outside)
        undecoded = {part_name(name, i) for name, layer in block.computed for i in range(layer.tensors)}
        require_decodable(
            (part for param in block.params if param.name in undecoded for part in param.parts), self._hardware
        )
        return block

    def _product_outside(self, param: StoredParam) -> StoredProduct | None:
        return self.linear.product_of(param) if param.name in self._outside_layers else None
