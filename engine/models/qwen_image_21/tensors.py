"""A 2.1 transformer's file: its configuration, from shapes, and its tensors sorted by block. Never touches weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import WrongModel
from ...files.checkpoint import Checkpoint, TensorEntry
from ...formats import described_tensors
from ..prefixes import find_prefix, under_prefix
from ..recognition import require
from ..sorting import shape_of, sort_blocks
from .component import TRANSFORMER_21

BLOCKS = "transformer_blocks."
# of a latent pixel, which is a token
CHANNELS = 64
# a head's dimensions for the frame; the rest is split evenly over height and width
_ROPE_AXES_OF_128 = (16, 56, 56)
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

    (head_dim,) = shape("transformer_blocks.0.attn.norm_q.weight", 1)
    inner_dim, channels = shape("img_in.weight", 2)
    given = checkpoint.config or {}
    axes = given.get("axes_dims_rope", [axis * head_dim // 128 for axis in _ROPE_AXES_OF_128])
    even = isinstance(axes, list) and len(axes) == 3 and all(isinstance(n, int) and n > 0 and n % 2 == 0 for n in axes)
    if not even or sum(axes) != head_dim or inner_dim % head_dim:
        raise WrongModel(
            "{file}: {inner_dim} dimensions in heads of {head_dim} do not split into even rotary axes ({axes!s:.99}).",
            code="transformer.wrong_axes",
            file=checkpoint.path,
            inner_dim=inner_dim,
            head_dim=head_dim,
            axes=axes,
        )
    drawn = shape("proj_out.weight", 2)[0]
    if (channels, drawn) != (CHANNELS, CHANNELS):
        raise WrongModel(
            "{file} takes {in_channels} channels and makes {drawn_channels}; Qwen-Image-2.1 has {channels}. Choose a "
            "file such as {example}.",
            code="transformer_21.other_channels",
            file=checkpoint.path,
            in_channels=channels,
            drawn_channels=drawn,
            channels=CHANNELS,
            example=TRANSFORMER_21.example,
        )
    return TransformerConfig(
        layers=layers,
        heads=inner_dim // head_dim,
        head_dim=head_dim,
        prompt_dim=shape("txt_in.in_layer.weight", 2)[1],
        mlp_dim=shape("transformer_blocks.0.img_mlp.out.weight", 2)[1],
        rope_axes=(axes[0], axes[1], axes[2]),
        joined=f"{BLOCKS}0.{JOINED_LAYER}.weight" in tensors,
    )
