"""A text encoder's file: its configuration, and its tensors sorted by layer. Never touches weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import WrongModel
from ...files.checkpoint import Checkpoint, TensorEntry
from ...formats import described_tensors
from ..component import Component
from ..prefixes import find_prefix, under_prefix
from ..recognition import require
from ..sorting import shape_of, sort_blocks
from .gguf_names import text_encoder_config, text_encoder_names

_LARGEST = 1e12  # of a setting's number
_FIRST_NORMS = ("layers.0.input_layernorm.weight", "blk.0.attn_norm.weight")  # transformers' name and llama.cpp's


@dataclass(frozen=True)
class Usual:
    """Settings of a model, where its file does not state them. series, size: how messages name it."""

    series: str
    size: str
    head_dim: int
    rope_theta: float
    sections: tuple[int, int, int]


@dataclass(frozen=True)
class TextEncoderTensors:
    """A text encoder's language model: `config` holds arguments of transformers' text configuration."""

    config: Mapping[str, Any]
    outside: Mapping[str, TensorEntry]
    layers: tuple[Mapping[str, TensorEntry], ...]


def sort_language_model(checkpoint: Checkpoint, component: Component, usual: Usual) -> TextEncoderTensors:
    """Raises WrongModel where the file is none of that kind, or lacks tensors."""
    require(checkpoint, component)
    tensors = text_encoder_names(checkpoint.tensors)
    described = described_tensors(checkpoint)
    for name, entry in under_prefix(described, find_prefix(described, component.anchors) or "").items():
        if name.startswith(("layers.", "embed_tokens.", "norm.")):
            tensors[name] = entry
    outside, layers = sort_blocks(checkpoint, tensors, "layers.")
    missing = [n for n in ("embed_tokens.weight", "norm.weight") if n not in outside]
    if missing:
        raise WrongModel(
            "{file} lacks {missing}: the text encoder is incomplete. Download it again.",
            code="text_encoder.not_whole",
            file=checkpoint.path,
            missing=missing,
        )
    return TextEncoderTensors(_text_config(checkpoint, outside, layers, usual), outside, layers)


def require_width(transformer: Checkpoint, norm: str, encoder: Checkpoint, component: Component, usual: Usual) -> None:
    """Raise WrongModel where the encoder makes embeddings of another size than the transformer takes, as the series'
    other sizes do. A norm of each tells it, which is never packed; `norm`: the transformer's, by its name's end."""
    takes, makes = _length(transformer, norm), _length(encoder, *_FIRST_NORMS)
    if None not in (takes, makes) and takes != makes:
        raise WrongModel(
            "{file} makes embeddings of {makes} numbers, but the transformer {transformer} takes {takes}: it is "
            "another size of {series} than this transformer needs ({size}). Use {example}.",
            code="text_encoder.other_size",
            file=encoder.path,
            makes=makes,
            transformer=transformer.path.name,
            takes=takes,
            series=usual.series,
            size=usual.size,
            example=component.example,
        )


def _length(checkpoint: Checkpoint, *ends: str) -> int | None:
    """Of the first vector whose name ends so."""
    found = (entry.shape for name, entry in checkpoint.tensors.items() if name.endswith(ends) and len(entry.shape) == 1)
    return next((shape[0] for shape in found), None)


def _text_config(
    checkpoint: Checkpoint,
    outside: Mapping[str, TensorEntry],
    layers: tuple[Mapping[str, TensorEntry], ...],
    usual: Usual,
) -> dict[str, Any]:
    def setting(config: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
        value = config.get(key)
        number = isinstance(value, int | float) and type(value) is not bool and 0 < value < _LARGEST
        if value is not None and not (number if kind is float else type(value) is kind):
            raise WrongModel(
                "{file}: {key} in its configuration is {value!r:.99}. Download it again.",
                code="text_encoder.wrong_setting",
                file=checkpoint.path,
                key=key,
                value=value,
            )
        return default if value is None else kind(value)

    given = checkpoint.config or text_encoder_config(checkpoint.metadata)
    text = setting(given, "text_config", dict, given)
    rope = setting(text, "rope_parameters", dict, None) or setting(text, "rope_scaling", dict, {})
    first = layers[0] if layers else {}
    vocab_size, hidden_size = shape_of(checkpoint, outside, "embed_tokens.weight", 2)
    key_dim = shape_of(checkpoint, first, "self_attn.k_proj.weight", 2)[0]
    heads = setting(text, "num_attention_heads", int, hidden_size // usual.head_dim)
    head_dim = hidden_size // max(1, heads)
    sections = setting(rope, "mrope_section", list, list(usual.sections))
    if heads < 1 or hidden_size % heads or key_dim % head_dim or heads % (key_dim // head_dim):
        raise WrongModel(
            "{file}: {hidden_size} and {key_dim} dimensions do not split into {heads} heads.",
            code="text_encoder.wrong_heads",
            file=checkpoint.path,
            hidden_size=hidden_size,
            key_dim=key_dim,
            heads=heads,
        )
    if len(sections) != 3 or not all(type(n) is int and n > 0 for n in sections) or 2 * sum(sections) != head_dim:
        raise WrongModel(
            "{file}: heads of {head_dim} do not split into rotary sections {sections!s:.99}.",
            code="text_encoder.wrong_sections",
            file=checkpoint.path,
            head_dim=head_dim,
            sections=sections,
        )
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shape_of(checkpoint, first, "mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": key_dim // head_dim,
        "rms_norm_eps": setting(text, "rms_norm_eps", float, 1e-6),
        "rope_theta": setting(rope, "rope_theta", float, setting(text, "rope_theta", float, usual.rope_theta)),
        "mrope_section": tuple(sections),
    }
