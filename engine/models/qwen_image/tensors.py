"""A transformer's file: its configuration, and its tensors sorted by block. Never touches weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import WrongModel
from ...files.checkpoint import Checkpoint, TensorEntry
from ...formats import described_tensors
from ..attention_heads import heads_of
from ..prefixes import find_prefix, under_prefix
from ..recognition import require
from ..sorting import shape_of, sort_blocks
from .component import TRANSFORMER
from .variants import Variant, is_layered, is_marked_2511, variant_of

_CHANNELS = 64  # of a patch of 2x2 latents
BLOCKS = "transformer_blocks."


@dataclass(frozen=True)
class TransformerConfig:
    """The arguments of diffusers' QwenImageTransformer2DModel that differ between family members."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int
    axes_dims_rope: tuple[int, int, int]
    in_channels: int = 64
    out_channels: int = 16
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class TransformerTensors:
    """A transformer's tensors sorted by where they are used: outside the blocks, or in block i, without prefixes."""

    variant: Variant
    config: TransformerConfig
    outside: Mapping[str, TensorEntry]
    blocks: tuple[Mapping[str, TensorEntry], ...]


def sort_transformer(checkpoint: Checkpoint, chosen: Variant | None = None) -> TransformerTensors:
    """`chosen` says which member of the family it is, where a person knows it; else the file does.

    Raises WrongModel where the file is no 20 B Qwen-Image transformer, lacks tensors, or contradicts itself or the
    choice.
    """
    require(checkpoint, TRANSFORMER)
    variant = variant_of(checkpoint, chosen)
    described = described_tensors(checkpoint)
    tensors = under_prefix(described, find_prefix(described, TRANSFORMER.anchors) or "")
    outside, blocks = sort_blocks(checkpoint, tensors, BLOCKS)
    return TransformerTensors(variant, _transformer_config(checkpoint, variant, tensors, len(blocks)), outside, blocks)


def _transformer_config(
    checkpoint: Checkpoint, variant: Variant, tensors: Mapping[str, TensorEntry], layers: int
) -> TransformerConfig:
    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        return shape_of(checkpoint, tensors, name, dimensions)

    heads = heads_of(checkpoint, tensors)
    drawn_channels = shape("proj_out.weight", 2)[0]
    if (heads.channels, drawn_channels) != (_CHANNELS, _CHANNELS):
        raise WrongModel(
            "{file} takes {in_channels} channels and makes {drawn_channels}; Qwen-Image has {channels}. Use the "
            "model's own file, such as {example}.",
            code="transformer.other_channels",
            file=checkpoint.path,
            in_channels=heads.channels,
            drawn_channels=drawn_channels,
            channels=_CHANNELS,
            example=TRANSFORMER.example,
        )
    return TransformerConfig(
        num_layers=layers,
        num_attention_heads=heads.count,
        attention_head_dim=heads.head_dim,
        joint_attention_dim=shape("txt_in.weight", 2)[1],
        axes_dims_rope=heads.rope_axes,
        in_channels=heads.channels,
        out_channels=drawn_channels // 4,
        zero_cond_t=variant is Variant.EDIT_2511 or is_marked_2511(checkpoint),
        use_additional_t_cond="time_text_embed.addition_t_embedding.weight" in tensors,
        use_layer3d_rope=is_layered(checkpoint),
    )
