"""A 2.1 transformer's file: its configuration, from shapes, and its tensors sorted by block. Never touches weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import WrongModel
from ...files.checkpoint import Checkpoint, TensorEntry
from ...formats import described_tensors
from ..attention_heads import heads_of
from ..prefixes import find_prefix, under_prefix
from ..recognition import require
from ..sorting import shape_of, sort_blocks
from .component import TRANSFORMER_21

BLOCKS = "transformer_blocks."
# of a latent pixel, which is a token
CHANNELS = 64
# one layer in ComfyUI's files, two in diffusers' folder: the rows of the first, then those of the second
JOINED_LAYER = "img_mlp.gate_up"
SPLIT_LAYERS = ("img_mlp.gate_layer", "img_mlp.proj")


@dataclass(frozen=True)
class TransformerConfig:
    """joined: gate and projection of the MLPs are one layer, as ComfyUI's files have them."""

    layers: int
    heads: int
    head_dim: int
    prompt_dim: int
    mlp_dim: int
    rope_axes: tuple[int, int, int]
    joined: bool

    @property
    def inner_dim(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class TransformerTensors:
    """A transformer's tensors sorted by where they are used: outside the blocks, or in block i, without prefixes."""

    config: TransformerConfig
    outside: Mapping[str, TensorEntry]
    blocks: tuple[Mapping[str, TensorEntry], ...]


def sort_transformer(checkpoint: Checkpoint) -> TransformerTensors:
    """Raises WrongModel where the file is no Qwen-Image-2.1 transformer, or lacks tensors."""
    require(checkpoint, TRANSFORMER_21)
    described = described_tensors(checkpoint)
    tensors = under_prefix(described, find_prefix(described, TRANSFORMER_21.anchors) or "")
    outside, blocks = sort_blocks(checkpoint, tensors, BLOCKS)
    return TransformerTensors(_config(checkpoint, tensors, len(blocks)), outside, blocks)


def _config(checkpoint: Checkpoint, tensors: Mapping[str, TensorEntry], layers: int) -> TransformerConfig:
    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        return shape_of(checkpoint, tensors, name, dimensions)

    heads = heads_of(checkpoint, tensors)
    drawn = shape("proj_out.weight", 2)[0]
    if (heads.channels, drawn) != (CHANNELS, CHANNELS):
        raise WrongModel(
            "{file} takes {in_channels} channels and makes {drawn_channels}; Qwen-Image-2.1 has {channels}. Use the "
            "model's own file, such as {example}.",
            code="transformer_21.other_channels",
            file=checkpoint.path,
            in_channels=heads.channels,
            drawn_channels=drawn,
            channels=CHANNELS,
            example=TRANSFORMER_21.example,
        )
    return TransformerConfig(
        layers=layers,
        heads=heads.count,
        head_dim=heads.head_dim,
        prompt_dim=shape("txt_in.in_layer.weight", 2)[1],
        mlp_dim=shape("transformer_blocks.0.img_mlp.out.weight", 2)[1],
        rope_axes=heads.rope_axes,
        joined=f"{BLOCKS}0.{JOINED_LAYER}.weight" in tensors,
    )
