"""What kind of model a file is, by its tensors' names, and whether it is the one that is wanted. Touches no weight."""

import re
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum

from ..errors import WrongModel
from ..files.checkpoint import Checkpoint, TensorEntry
from ..texts import shown
from .prefixes import find_prefix, find_prefixes, is_average
from .qwen25_vl.gguf_names import TEXT_ARCHITECTURES


class Component(Enum):
    """What kind of model a file holds, worded for messages."""

    TRANSFORMER = "a Qwen-Image transformer"
    TRANSFORMER_2_1 = "a Qwen-Image-2.1 transformer"
    TEXT_ENCODER = "a Qwen2.5-VL text encoder"
    OTHER_TEXT_ENCODER = "the text encoder of another model"
    VISION = "the vision part (mmproj) of a text encoder"
    VAE = "a VAE"
    LORA = "a LoRA"
    UNMERGED = "a model with a place for LoRAs in its layers (base_layer), as PEFT has it while it trains"
    CONTROLNET = "a ControlNet"
    MODEL_PATCH = "a model patch (DiffSynth)"
    OTHER_QUANTIZATION = (
        "a model quantized for another program (GPTQ, AWQ, quanto, torchao, or nunchaku for another model)"
    )
    FLUX = "a Flux transformer"
    WAN = "a Wan video transformer"
    STABLE_DIFFUSION = "a Stable Diffusion checkpoint"
    TINY_VAE = "a small VAE for previews"
    UNKNOWN = "a model that is not recognised"


_FOLDER_OF = {
    Component.TRANSFORMER: "diffusion_models",
    Component.TEXT_ENCODER: "text_encoders",
    Component.OTHER_TEXT_ENCODER: "text_encoders",
    Component.VISION: "text_encoders",
    Component.VAE: "vae",
    Component.LORA: "loras",
    Component.CONTROLNET: "controlnet",
    Component.MODEL_PATCH: "model_patches",
    Component.TINY_VAE: "vae_approx",
}

# what a person cannot see in the folders
_HINT_OF = {
    Component.VISION: " It is found by itself beside the text encoder that it belongs to.",
    Component.UNMERGED: " Merge the LoRA into it first (merge_and_unload), or use its LoRA alone.",
}

EXAMPLE_OF = {
    Component.TRANSFORMER: "qwen_image_fp8_e4m3fn.safetensors",
    Component.TEXT_ENCODER: "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    Component.VAE: "qwen_image_vae.safetensors",
}

# the first pattern that matches any key decides, so the telling ones stand first
_SIGNS: tuple[tuple[str, Component], ...] = (
    (r"\.base_layer\.weight$", Component.UNMERGED),
    (r"lora_(up|down|A|B)\b|\.lora\.(up|down)\.|lokr_w|hada_w", Component.LORA),
    (r"^controlnet_blocks\.\d+\.x_rms\.", Component.MODEL_PATCH),
    (r"^(controlnet_|control_model\.)", Component.CONTROLNET),
    (r"transformer_blocks\.\d+\.attn\.add_qkv_proj\.qweight$", Component.TRANSFORMER),
    (
        r"\.(qweight|wscales|weight_packed|_?weight_qdata|weight:_data|weight\._(data|scale))$",
        Component.OTHER_QUANTIZATION,
    ),
    # 2.1 has one stream; its blocks' attention is named as that of others
    (r"(^|\.)txt_in\.text_norm\.weight$|\.img_mlp\.(gate_up|gate_layer)\.weight$", Component.TRANSFORMER_2_1),
    (r"transformer_blocks\.\d+\.attn\.add_q_proj\.weight", Component.TRANSFORMER),
    (r"text_model\.encoder\.layers\.|encoder\.block\.\d+\.layer\.|^enc\.blk\.\d+\.", Component.OTHER_TEXT_ENCODER),
    (r"(^|\.)visual\.blocks\.\d+\.mlp\.(linear_)?fc1\.", Component.OTHER_TEXT_ENCODER),  # Qwen2-VL and Qwen3-VL
    (r"^v\.blk\.\d+\.", Component.VISION),
    (r"layers\.\d+\.self_attn\.q_proj\.weight|^blk\.\d+\.attn_q\.weight", Component.TEXT_ENCODER),
    (
        r"model\.diffusion_model\.input_blocks\.|(^|\.)down_blocks\.\d+\.attentions\.|joint_blocks\.\d+\.",
        Component.STABLE_DIFFUSION,
    ),
    (r"double_blocks\.\d+\.img_attn\.|single_transformer_blocks\.", Component.FLUX),
    (r"blocks\.\d+\.cross_attn\.q\.weight", Component.WAN),
    (r"(^|\.)(decoder|encoder)\.(conv_in|conv1|up_blocks|upsamples|downsamples)\.", Component.VAE),
    (r"^(taesd_)?(decoder|encoder)\.(layers\.)?\d+\.(conv\.\d+\.)?weight$", Component.TINY_VAE),
)

# names that a component of the 20 B family has, and those of a part of it, by which its prefix is found all the same
_BLOCK, _LAYER = "transformer_blocks.0.attn.add_q_proj.weight", "layers.0.self_attn.q_proj.weight"
TRANSFORMER_ANCHORS = (
    (_BLOCK, "img_in.weight", "transformer_blocks.0.img_mod.1.weight"),
    (_BLOCK,),
    ("img_in.weight",),
)
_KINDS_OF_LAYERS = ((".img_mod.1.",), (".img_mlp.",), ("img_in.weight", "proj_out.weight"))  # one of each is enough
TEXT_ANCHORS = (("embed_tokens.weight", _LAYER, "layers.0.self_attn.q_proj.bias"), (_LAYER,), ("embed_tokens.weight",))
VAE_ANCHORS = (
    ("decoder.conv1.weight", "decoder.head.2.weight", "conv2.weight"),
    ("decoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight"),
)
_LANGUAGE_MODEL = re.compile(r"((?<![^.])(language_)?model\.)+$")  # the vision part stands beside it
_WHOLE = {
    Component.TRANSFORMER: TRANSFORMER_ANCHORS[:1],
    Component.TEXT_ENCODER: TEXT_ANCHORS[:1],
    Component.VAE: VAE_ANCHORS,
}


def identify(tensors: Mapping[str, TensorEntry]) -> Component:
    """What kind of model these tensor names belong to."""
    for pattern, component in _SIGNS:
        search = re.compile(pattern).search
        if any(search(name) for name in tensors):
            # Qwen2 alone among the language models in use has biases there
            if component is Component.TEXT_ENCODER and not any(re.search(r"q(_proj)?\.bias", n) for n in tensors):
                return Component.OTHER_TEXT_ENCODER
            return component
    return Component.UNKNOWN


def components(tensors: Mapping[str, TensorEntry]) -> set[Component]:
    """Which of the family's three components a file holds, by names that must be there: all of them in an all-in-one
    file."""
    return set(_roots(tensors))


def only(checkpoint: Checkpoint, component: Component) -> Checkpoint:
    """Of an all-in-one file the tensors of one component, under the names that they have there; other files as they
    are."""
    roots = _roots(checkpoint.tensors)
    if component not in roots or len(roots) == 1:
        return checkpoint
    own = roots.pop(component)
    others = tuple(root for root in roots.values() if root.startswith(own) and root != own)
    return replace(
        checkpoint,
        tensors={n: e for n, e in checkpoint.tensors.items() if n.startswith(own) and not n.startswith(others)},
    )


def _roots(tensors: Mapping[str, TensorEntry]) -> dict[Component, str]:
    """What stands before all names of each component that a file holds: a text encoder's vision part too."""
    found = {component: find_prefix(tensors, anchors) for component, anchors in _WHOLE.items()}
    return {component: _LANGUAGE_MODEL.sub("", prefix) for component, prefix in found.items() if prefix is not None}


def require(checkpoint: Checkpoint, wanted: Component) -> None:
    """Raise WrongModel, saying what the file is and where it belongs, unless it is `wanted`, or holds it beside
    others."""
    found = identify(checkpoint.tensors)
    architecture = checkpoint.metadata.get("general.architecture")
    if found is Component.TEXT_ENCODER and architecture not in (None, *TEXT_ARCHITECTURES):
        found = Component.OTHER_TEXT_ENCODER
    if found is wanted or {found, wanted} <= components(checkpoint.tensors):
        if wanted is Component.TRANSFORMER:
            _require_all_kinds(checkpoint)
            _require_one(checkpoint)
        return
    size = f"{len(checkpoint.tensors)} tensors"
    stated = size if architecture is None else f"GGUF architecture {architecture!r:.99}, {size}"
    folder = _FOLDER_OF.get(found)
    belongs = f" It belongs in models/{folder}." if folder not in (None, _FOLDER_OF[wanted]) else ""
    raise WrongModel(
        f"{checkpoint.path} is {found.value} ({stated}); {wanted.value} is needed here.{belongs}"
        f"{_HINT_OF.get(found, '')} Choose a file from models/{_FOLDER_OF[wanted]}, such as {EXAMPLE_OF[wanted]}."
    )


def _require_all_kinds(checkpoint: Checkpoint) -> None:
    """Raise WrongModel for a file of some of a transformer's layers, such as its attention alone."""
    missing = [
        kind[0] for kind in _KINDS_OF_LAYERS if not any(part in name for name in checkpoint.tensors for part in kind)
    ]
    if missing:
        raise WrongModel(
            f"{checkpoint.path} holds a part of {Component.TRANSFORMER.value} ({len(checkpoint.tensors)} tensors; none "
            f"is called {', '.join(missing)}), such as layers that were trained or saved by themselves. Use the whole "
            f"model, such as {EXAMPLE_OF[Component.TRANSFORMER]}; changes of some layers belong in a LoRA."
        )


def _require_one(checkpoint: Checkpoint) -> None:
    """Raise WrongModel for a file of several transformers, such as a teacher's and a student's; a running average
    (EMA) of one is no other."""
    prefixes = find_prefixes(checkpoint.tensors, _WHOLE[Component.TRANSFORMER])
    models = [prefix for prefix in prefixes if not is_average(prefix)]
    if len(models) > 1:
        raise WrongModel(
            f"{checkpoint.path} holds {len(models)} transformers, whose tensors' names begin with "
            f"{' and '.join(shown(prefix) for prefix in models[:3])}, and nothing tells which one is meant. Use a file "
            "that holds one."
        )
