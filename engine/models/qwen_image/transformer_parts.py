"""What a transformer's file holds, part by part, the empty modules it fills, and what they take. Reads headers only."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...compute.token_chunks import ChunkedTokens
from ...files.checkpoint import Checkpoint
from ...hardware import Hardware
from ...packages import ATTENTION, accelerate, diffusers_transformer
from ...planning.footprint import TransformerFootprint
from ...streaming import (
    BlockSource,
    BlockStore,
    FileSource,
    HostMemory,
    StoredBlock,
    WeightPatch,
    read_params,
    store_block,
)
from .tensors import TransformerConfig, sort_transformer
from .variants import Variant

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

BLOCKS = "transformer_blocks."


class TransformerParts:
    """A transformer's tensors sorted into what stays on the device, the blocks, and their modulation.

    Holds no weight, and no file open. `footprint` is what a plan is made from.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        hardware: Hardware,
        others: Sequence[Hardware] = (),
        variant: Variant | None = None,
        source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource,
    ) -> None:
        """`others`: further devices that blocks may stay on. `variant` None: as the file says.

        Raises WrongModel, DamagedFile or MissingFile.
        """
        tensors = sort_transformer(checkpoint, variant)
        self.config = tensors.config
        self.variant = tensors.variant
        self._dtype, self._source, self._where = dtype, source, str(checkpoint.path)
        self._outside = tensors.outside
        with torch.device("meta"):
            self._outside_shapes = _shapes(self._model())
        self._blocks = tensors.blocks
        # not methods: a store that referred to this would keep an unloaded model's memory until the next collection
        make_block, make_modulation = partial(_empty_block, self.config), partial(_empty_modulation, self.config)
        self._block_shapes, self._modulation_shapes = _shapes(make_block()), _shapes(make_modulation())
        self._hardware = hardware
        host = HostMemory(hardware)

        def store(
            shapes: Mapping[str, tuple[int, ...]], make_module: Callable[[], nn.Module], on: Hardware = hardware
        ) -> BlockStore:
            blocks = self._stored(shapes, {})
            return BlockStore(blocks, source(blocks), make_module, on, host=host)

        self.store = store(self._block_shapes, make_block)
        self.annex_stores = [store(self._block_shapes, make_block, other) for other in others]
        self.modulation_store = store(self._modulation_shapes, make_modulation)

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Every weight's shape by its name in diffusers' model."""
        in_block = self._block_shapes | self._modulation_shapes
        names = {f"{BLOCKS}{i}.{name}": shape for i in range(len(self._blocks)) for name, shape in in_block.items()}
        return self._outside_shapes | names

    def patch(self, patches: Mapping[str, WeightPatch]) -> None:
        """From now on apply these to the weights of those names, and no others; between two runs."""
        for shapes, stores in (
            (self._block_shapes, [self.store, *self.annex_stores]),
            (self._modulation_shapes, [self.modulation_store]),
        ):
            for store in stores:
                blocks = self._stored(shapes, patches)
                store.replace(blocks, self._source(blocks))

    def _stored(self, shapes: Mapping[str, tuple[int, ...]], patches: Mapping[str, WeightPatch]) -> list[StoredBlock]:
        return [
            store_block(
                shapes,
                entries,
                self._dtype,
                f"{self._where}, block {i}",
                [patches[full] for name in shapes if (full := f"{BLOCKS}{i}.{name}") in patches],
            )
            for i, entries in enumerate(self._blocks)
        ]

    @property
    def footprint(self) -> TransformerFootprint:
        """What a plan is made from, the patches included."""
        return TransformerFootprint(
            blocks=self.config.num_layers,
            slot_bytes=self.store.slot_bytes,
            stored_bytes=self.store.raw_bytes,
            staging_bytes=self.store.staging_bytes,
            native=all(block.native for block in self.store.blocks),
            outside_bytes=sum(prod(shape) for shape in self._outside_shapes.values()) * self._dtype.itemsize,
            modulation_slot_bytes=self.modulation_store.slot_bytes,
            modulation_stored_bytes=self.modulation_store.raw_bytes,
            modulation_staging_bytes=self.modulation_store.staging_bytes,
            inner_dim=self.config.inner_dim,
            head_dim=self.config.attention_head_dim,
            joint_attention_dim=self.config.joint_attention_dim,
            element_bytes=self._dtype.itemsize,
            scratch_bytes=self.store.scratch_bytes,
            modulation_scratch_bytes=self.modulation_store.scratch_bytes,
            ring_bytes=self.store.ring_bytes + self.modulation_store.ring_bytes,
            host=self._hardware.host_device,
            zero_cond_t=self.config.zero_cond_t,
        )

    def read_outside(self, patches: Mapping[str, WeightPatch] | None = None) -> dict[str, Tensor]:
        """The weights outside the blocks, patched, on the host, by their names in `empty_model`."""
        own = [patch for name, patch in (patches or {}).items() if name in self._outside_shapes]
        return read_params(self._outside, self._outside_shapes, self._dtype, self._where, self._source, own)

    def empty_model(self) -> "QwenImageTransformer2DModel":
        """diffusers' model without its blocks, its parameters on the meta device."""
        with accelerate().init_empty_weights():  # unlike the meta device, it makes the rotary tables
            return self._model().eval()

    def _model(self) -> "QwenImageTransformer2DModel":
        config = self.config
        return diffusers_transformer().QwenImageTransformer2DModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=0,
            attention_head_dim=config.attention_head_dim,
            num_attention_heads=config.num_attention_heads,
            joint_attention_dim=config.joint_attention_dim,
            axes_dims_rope=config.axes_dims_rope,
            zero_cond_t=config.zero_cond_t,
            use_additional_t_cond=config.use_additional_t_cond,
            use_layer3d_rope=config.use_layer3d_rope,
        )


def _whole_block(config: TransformerConfig) -> "QwenImageTransformerBlock":
    with torch.device("meta"):
        block = diffusers_transformer().QwenImageTransformerBlock(
            dim=config.inner_dim,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            zero_cond_t=config.zero_cond_t,
        )
    block.attn.processor._attention_backend = ATTENTION  # not what the environment or another pack sets for diffusers
    return block.eval()


def _empty_block(config: TransformerConfig) -> nn.Module:
    block = _whole_block(config)
    block.img_mod, block.txt_mod = _FromTable(), _FromTable()
    block.img_mlp, block.txt_mlp = ChunkedTokens(block.img_mlp), ChunkedTokens(block.txt_mlp)
    return block


def _empty_modulation(config: TransformerConfig) -> nn.Module:
    block = _whole_block(config)
    part = nn.Module()
    part.img_mod, part.txt_mod = block.img_mod, block.txt_mod
    return part


class _FromTable(nn.Module):
    """Stands in a block where its modulation weights were, and returns what they would have computed."""

    value: Tensor

    def forward(self, temb: Tensor) -> Tensor:
        return self.value


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}
