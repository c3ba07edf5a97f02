"""What a Qwen-VL language model is, whichever version: a value made from its file's header. Holds no weight."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ...files.checkpoint import TensorEntry


@dataclass(frozen=True)
class LanguageModel:
    """A language model's tensors, by their names in transformers' modules, and empty modules of it.

    make_layer: one decoder layer, its parameters on the meta device; make_rotary: what gives its position embeddings;
    make_norm: the final norm, whose weight is `norm.weight`; None where states are those of before it. These must not
    refer to anything that holds weights. attention_states: as in TextEncoderFootprint.
    """

    outside: Mapping[str, TensorEntry]
    layers: Sequence[Mapping[str, TensorEntry]]
    make_layer: Callable[[], nn.Module]
    make_rotary: Callable[[], nn.Module]
    make_norm: Callable[[], nn.Module] | None
    hidden_size: int
    intermediate_size: int
    heads: int
    key_heads: int
    attention_states: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads
