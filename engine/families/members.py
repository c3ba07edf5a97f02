"""What a checkpoint is: family member, configuration, prompt template, names of its tensors. Never touches weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoints.checkpoint import Checkpoint, TensorEntry
from ..errors import WrongModel
from ..formats.comfy_quant import with_comfy_quants
from ..formats.nunchaku_layers import with_nunchaku_layers
from ..formats.quant_states import with_quant_states
from .components import EXAMPLE_OF, TEXT_ANCHORS, TRANSFORMER_ANCHORS, VAE_ANCHORS, Component, require
from .gguf_names import text_encoder_config, text_encoder_names
from .prefixes import find_prefix, under_prefix
from .variants import Variant, is_layered, is_marked_2511, variant_of

# Qwen-Image's prompt template, and how many of its tokens are dropped from the embeddings
# (diffusers pipeline_qwenimage.py: prompt_template_encode, prompt_template_encode_start_idx).
PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PROMPT_TEMPLATE_TOKENS = 34
# the same of the editing models (pipeline_qwenimage_edit_plus.py); Edit's own differs in how pictures stand in it
EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
EDIT_TEMPLATE_TOKENS = 64
PICTURE_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
# the longest prompt that the reference pipelines allow, template not counted
MAX_PROMPT_TOKENS = 1024
# of the transformer's rotary tables, either side of 0: no prompt can have more tokens
MAX_POSITIONS = 4096

# per-channel statistics of the latents (diffusers AutoencoderKLQwenImage.config, equal to Wan 2.1's)
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# the reference's share of a head's dimensions for the time axis; the rest is split evenly over height and width
_ROPE_AXES_OF_128 = (16, 56, 56)
_TEXT_HEAD_DIM = 128  # of Qwen2.5-VL-7B; no tensor's shape tells it
_LARGEST = 1e12  # of a setting's number
_FIRST_NORMS = ("layers.0.input_layernorm.weight", "blk.0.attn_norm.weight")  # transformers' name and llama.cpp's
_CHANNELS = 64  # of a patch of 2x2 latents


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
    require(checkpoint, Component.TRANSFORMER)
    variant = variant_of(checkpoint, chosen)
    described = described_tensors(checkpoint)
    tensors = under_prefix(described, find_prefix(described, TRANSFORMER_ANCHORS) or "")
    outside, blocks = split_blocks(checkpoint, tensors, "transformer_blocks.")
    return TransformerTensors(variant, _transformer_config(checkpoint, variant, tensors, len(blocks)), outside, blocks)


@dataclass(frozen=True)
class TextEncoderTensors:
    """A text encoder's language model: `config` holds transformers' Qwen2_5_VLTextConfig arguments."""

    config: Mapping[str, Any]
    outside: Mapping[str, TensorEntry]
    layers: tuple[Mapping[str, TensorEntry], ...]


def sort_text_encoder(checkpoint: Checkpoint) -> TextEncoderTensors:
    """Raises WrongModel where the file is no Qwen2.5-VL, or lacks tensors."""
    require(checkpoint, Component.TEXT_ENCODER)
    tensors = text_encoder_names(checkpoint.tensors)
    described = described_tensors(checkpoint)
    for name, entry in under_prefix(described, find_prefix(described, TEXT_ANCHORS) or "").items():
        if name.startswith(("layers.", "embed_tokens.", "norm.")):
            tensors[name] = entry
    outside, layers = split_blocks(checkpoint, tensors, "layers.")
    missing = [n for n in ("embed_tokens.weight", "norm.weight") if n not in outside]
    if missing:
        raise WrongModel(f"{checkpoint.path} lacks {', '.join(missing)}: not a whole text encoder. Download it again.")
    return TextEncoderTensors(_text_config(checkpoint, outside, layers), outside, layers)


def require_fitting_encoder(transformer: Checkpoint, encoder: Checkpoint) -> None:
    """Raise WrongModel where the encoder makes embeddings of another size than the transformer takes, as Qwen2.5-VL in
    3B and 72B does. A norm of each tells it: those are never packed."""
    takes, makes = _length(transformer, "txt_norm.weight"), _length(encoder, *_FIRST_NORMS)
    if None not in (takes, makes) and takes != makes:
        raise WrongModel(
            f"{encoder.path} makes embeddings of {makes} numbers, the transformer {transformer.path.name} takes "
            f"{takes}: it is another size of Qwen2.5-VL than the one that belongs to it (7B). Use "
            f"{EXAMPLE_OF[Component.TEXT_ENCODER]}."
        )


def _length(checkpoint: Checkpoint, *ends: str) -> int | None:
    """Of the first vector whose name ends so."""
    found = (entry.shape for name, entry in checkpoint.tensors.items() if name.endswith(ends) and len(entry.shape) == 1)
    return next((shape[0] for shape in found), None)


def vae_tensors(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """A VAE's tensors under its own names, whichever program wrote them; all of the file's where no VAE is known."""
    return under_prefix(checkpoint.tensors, find_prefix(checkpoint.tensors, VAE_ANCHORS) or "")


def described_tensors(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """The tensors with what notes beside them tell of their formats."""
    tensors = with_nunchaku_layers(with_quant_states(checkpoint.tensors))
    return with_comfy_quants(tensors, checkpoint.metadata, checkpoint.path)


def split_blocks(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorEntry], prefix: str
) -> tuple[dict[str, TensorEntry], tuple[dict[str, TensorEntry], ...]]:
    """What is not numbered under `prefix`, and what is, block by block. Raises WrongModel where a block is missing."""
    outside: dict[str, TensorEntry] = {}
    blocks: dict[int, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            if not (index.isascii() and index.isdigit() and len(index) < 9 and rest):
                raise WrongModel(
                    f"{checkpoint.path}: {name!r} is no tensor of a numbered block. Download the file again."
                )
            blocks.setdefault(int(index), {})[rest] = entry
        else:
            outside[name] = entry
    if sorted(blocks) != list(range(len(blocks))):
        raise WrongModel(
            f"{checkpoint.path}: of blocks 0..{max(blocks)} only {len(blocks)} are in the file. Download it again."
        )
    return outside, tuple(blocks[i] for i in range(len(blocks)))


def _transformer_config(
    checkpoint: Checkpoint, variant: Variant, tensors: Mapping[str, TensorEntry], layers: int
) -> TransformerConfig:
    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        return shape_of(checkpoint, tensors, name, dimensions)

    (head_dim,) = shape("transformer_blocks.0.attn.norm_q.weight", 1)
    inner_dim, in_channels = shape("img_in.weight", 2)
    given = checkpoint.config or {}
    axes = given.get("axes_dims_rope", [axis * head_dim // 128 for axis in _ROPE_AXES_OF_128])
    even = isinstance(axes, list) and len(axes) == 3 and all(isinstance(n, int) and n > 0 and n % 2 == 0 for n in axes)
    if not even or sum(axes) != head_dim or inner_dim % head_dim:
        raise WrongModel(
            f"{checkpoint.path}: {inner_dim} dimensions in heads of {head_dim} do not split into even rotary axes "
            f"({axes!s:.99})."
        )
    drawn_channels = shape("proj_out.weight", 2)[0]
    if (in_channels, drawn_channels) != (_CHANNELS, _CHANNELS):
        raise WrongModel(
            f"{checkpoint.path} takes {in_channels} channels and makes {drawn_channels}; Qwen-Image has {_CHANNELS}. "
            f"Choose a file such as {EXAMPLE_OF[Component.TRANSFORMER]}."
        )
    return TransformerConfig(
        num_layers=layers,
        num_attention_heads=inner_dim // head_dim,
        attention_head_dim=head_dim,
        joint_attention_dim=shape("txt_in.weight", 2)[1],
        axes_dims_rope=(axes[0], axes[1], axes[2]),
        in_channels=in_channels,
        out_channels=drawn_channels // 4,
        zero_cond_t=variant is Variant.EDIT_2511 or is_marked_2511(checkpoint),
        use_additional_t_cond="time_text_embed.addition_t_embedding.weight" in tensors,
        use_layer3d_rope=is_layered(checkpoint),
    )


def _text_config(
    checkpoint: Checkpoint, outside: Mapping[str, TensorEntry], layers: tuple[Mapping[str, TensorEntry], ...]
) -> dict[str, Any]:
    def setting(config: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
        value = config.get(key)
        number = isinstance(value, int | float) and type(value) is not bool and 0 < value < _LARGEST
        if value is not None and not (number if kind is float else type(value) is kind):
            raise WrongModel(f"{checkpoint.path}: {key} of its configuration is {value!r:.99}. Download it again.")
        return default if value is None else kind(value)

    given = checkpoint.config or text_encoder_config(checkpoint.metadata)
    text = setting(given, "text_config", dict, given)
    rope = setting(text, "rope_parameters", dict, None) or setting(text, "rope_scaling", dict, {})
    first = layers[0] if layers else {}
    vocab_size, hidden_size = shape_of(checkpoint, outside, "embed_tokens.weight", 2)
    key_dim = shape_of(checkpoint, first, "self_attn.k_proj.weight", 2)[0]
    heads = setting(text, "num_attention_heads", int, hidden_size // _TEXT_HEAD_DIM)
    head_dim = hidden_size // max(1, heads)
    sections = setting(rope, "mrope_section", list, [16, 24, 24])
    if heads < 1 or hidden_size % heads or key_dim % head_dim or heads % (key_dim // head_dim):
        raise WrongModel(f"{checkpoint.path}: {hidden_size} and {key_dim} dimensions do not split into {heads} heads.")
    if len(sections) != 3 or not all(type(n) is int and n > 0 for n in sections) or 2 * sum(sections) != head_dim:
        raise WrongModel(f"{checkpoint.path}: heads of {head_dim} do not split into rotary sections {sections!s:.99}.")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shape_of(checkpoint, first, "mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": key_dim // head_dim,
        "rms_norm_eps": setting(text, "rms_norm_eps", float, 1e-6),
        "rope_theta": setting(rope, "rope_theta", float, setting(text, "rope_theta", float, 1_000_000.0)),
        "mrope_section": tuple(sections),
    }


def shape_of(checkpoint: Checkpoint, tensors: Mapping[str, TensorEntry], name: str, dimensions: int) -> tuple[int, ...]:
    """Of a tensor that has to be there, with that many dimensions, none of them empty."""
    if name not in tensors:
        raise WrongModel(f"{checkpoint.path} lacks {name}: the model is not whole. Download it again.")
    shape = tensors[name].shape
    if len(shape) != dimensions or 0 in shape:
        raise WrongModel(f"{checkpoint.path}: {name} has shape {list(shape)}, which no Qwen-Image has.")
    return shape
