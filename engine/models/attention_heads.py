"""How a transformer's width splits into heads, and a head into rotary axes: what both Qwen-Image networks share."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import WrongModel
from ..files.checkpoint import Checkpoint, TensorEntry
from .sorting import shape_of

# a head's dimensions for the frame, height and width
_ROPE_AXES_OF_128 = (16, 56, 56)


@dataclass(frozen=True)
class Heads:
    """channels: of a token, before the first layer makes it inner_dim wide."""

    channels: int
    inner_dim: int
    head_dim: int
    rope_axes: tuple[int, int, int]

    @property
    def count(self) -> int:
        return self.inner_dim // self.head_dim


def heads_of(checkpoint: Checkpoint, tensors: Mapping[str, TensorEntry]) -> Heads:
    """From shapes, and from the configuration where there is one. Raises WrongModel where they do not fit."""
    (head_dim,) = shape_of(checkpoint, tensors, "transformer_blocks.0.attn.norm_q.weight", 1)
    inner_dim, channels = shape_of(checkpoint, tensors, "img_in.weight", 2)
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
    return Heads(channels, inner_dim, head_dim, (axes[0], axes[1], axes[2]))
