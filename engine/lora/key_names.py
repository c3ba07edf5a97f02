"""What the keys of a LoRA file mean: which layer of the transformer, and which part of its change. Reads no file."""

import re
from collections.abc import Iterable, Mapping

# what trainers put before a layer's dotted name; several may stand in a row
_PREFIXES = ("model.", "diffusion_model.", "base_model.", "transformer.", "pipe.", "dit.", "unet.", "module.")
# what they put before a name whose dots have become underscores
_FLAT_PREFIXES = (
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lora_diffusion_model_",
    "lycoris_",
    "transformer_",
    "",
)

_BLOCKS = "transformer_blocks."  # whose layers' names other kinds of models do not end with

# the parts that make a change, by its kind
PARTS_OF: Mapping[str, tuple[str, ...]] = {
    "LoRA": ("up", "down"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "diff": ("diff",),
}

# what follows a layer's name -> the part's name here
_PARTS: Mapping[str, str] = {
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B": "up",
    ".lora_A": "down",
    ".lora.up.weight": "up",
    ".lora.down.weight": "down",
    "_lora.up.weight": "up",
    "_lora.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_up.bias": "up_bias",
    ".lora_B.bias": "up_bias",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "diff_b",
    ".b_norm": "diff_b",
    **{f".{part}": part for part in (*PARTS_OF["LoHa"], *PARTS_OF["LoKr"])},
}

# PEFT puts an adapter's name, mostly "default", after the part's
_ADAPTER = re.compile(r"(\.(?:lora_[AB]|lora_magnitude_vector|hada_w\w+|lokr_w\w+))\.(?!(?:weight|bias)$)[^.]+")

# changes of weights that the engine does not compute; ComfyUI's adapters compute those of COMFYUIS_KINDS
_UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (r"\.set_weight", "a weight that takes the model's place (set_weight)"),
    (r"\.reshape_weight", "a change of a weight's shape (reshape_weight)"),
    (r"\.(oft_\w+(\.\w+)*|rescale)", "OFT or BOFT"),
    (r"\.[ab][12]\.weight", "GLoRA"),
    (r"\.(lora_mid\.weight|hada_t[12]|lokr_t2)", "a convolution's Tucker decomposition"),
    (r"\.(ia3_l|on_input|vera_lambda_\w+|lora_(E|embedding_\w+))(\.\w+)*", "IA3, VeRA, AdaLoRA or an embedding's LoRA"),
    (r"\.magnitude", "DoRA with a key 'magnitude'"),
    (
        r"\.(lora|hada|lokr)_\w+\.(weight\.)?(scale_weight|weight_scale\w*|SCB|absmax|quant_\w+(\.\w+)?|comfy_quant)",
        "a quantized LoRA",
    ),
)

COMFYUIS_KINDS = ("OFT or BOFT", "GLoRA")

# layers that one network of ours has, and another whose names are like its own has not
_SIBLINGS = (
    (r"txt_mlp|(img|txt)_mod[._]|img_mlp[._]net|add_[qkv]_proj|to_add_out", "the 20B Qwen-Image family"),
    (r"img_mlp[._](gate_up|gate_layer|proj|out)([._]|$)|txt_in[._](in|out)_layer", "Qwen-Image-2.1"),
)
# another model's layers, by names that the model itself has not; the first that is found decides
_MODELS: tuple[tuple[str, str], ...] = (
    (r"single_transformer_blocks|double_blocks|single_blocks", "Flux or HunyuanVideo"),
    (r"(down|up|input|output)_blocks|mid(dle)?_block", "Stable Diffusion 1.5 or SDXL"),
    (r"joint_blocks|ff_context", "Stable Diffusion 3"),
    (r"(^|[._])blocks[._]\d+[._](self|cross)_attn|transformer_blocks[._]\d+[._]attn[12]", "Wan or LTX"),
    (r"(^|[._])layers[._]\d+[._](attention|feed_forward)", "Z-Image or Lumina"),
    *_SIBLINGS,
    (r"lora_te|text_encoder|text_model|self_attn", "a text encoder"),
    (r"transformer_blocks[._]\d+[._]attn[._]", "another size or kind of transformer"),
)
# Flux in diffusers' names shares some of its layers' names and shapes with Qwen-Image
_HALF_SHARED = "single_transformer_blocks"


class LayerNames:
    """Finds a layer of the transformer under every trainer's spelling of its name."""

    def __init__(self, weights: Iterable[str], spellings: Iterable[str] = ()) -> None:
        """`weights`: names such as "img_in.weight". `spellings`: all of a file; where none of them begins with anything
        known, what they have in common before the layers' names is taken off as well."""
        self._layers = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
        self._flat = {name.replace(".", "_"): name for name in self._layers}
        self._own_prefix = ""
        listed = set(spellings)
        if not any(self.find(spelling) for spelling in listed):
            self._own_prefix = self._common_prefix(listed)

    def find(self, spelling: str) -> str | None:
        """The layer's name without prefixes, or None where there is no such layer."""
        spelling = spelling.removeprefix(self._own_prefix)
        for prefix in _FLAT_PREFIXES:
            if spelling.startswith(prefix) and (name := self._flat.get(spelling.removeprefix(prefix))) is not None:
                return name
        while spelling not in self._layers:
            prefix = next((prefix for prefix in _PREFIXES if spelling.startswith(prefix)), "")
            if not prefix:
                return None
            spelling = spelling.removeprefix(prefix)
        return spelling

    def _common_prefix(self, spellings: Iterable[str]) -> str:
        """What stands before the names of layers; empty where that is not one text, or another model's by its name."""
        prefixes = {prefix for spelling in spellings if (prefix := self._prefix_of(spelling))}
        only = prefixes.pop() if len(prefixes) == 1 else ""
        return "" if "control" in only.lower() else only

    def _prefix_of(self, spelling: str) -> str:
        prefix, block, rest = spelling.partition(_BLOCKS)
        return prefix if prefix.endswith(".") and block + rest in self._layers else ""


def split_key(key: str) -> tuple[str, str] | None:
    """The layer as the file spells it, and the part's name; None for a key that is no part of a change."""
    key = _ADAPTER.sub(r"\1", key)
    for suffix, part in _PARTS.items():
        if key.endswith(suffix) and len(key) > len(suffix):
            return key.removesuffix(suffix), part
    return None


def unsupported_kind(key: str) -> tuple[str, str] | None:
    """The layer as the file spells it, and in words what kind of change this is; None where it is none of these."""
    for pattern, kind in _UNSUPPORTED:
        if match := re.fullmatch(rf"(.+?){pattern}", key):
            return match[1], kind
    return None


def guess_model(keys: Iterable[str], weights: Iterable[str]) -> str | None:
    """Which other model than that of `weights` a file's keys belong to, in words."""
    listed = list(keys)
    for pattern, model in _others(weights, _MODELS):
        if any(re.search(pattern, key) for key in listed):
            return model
    return None


def is_of_half_shared_model(keys: Iterable[str], weights: Iterable[str]) -> bool:
    """Whether keys that found no layer among `weights` show that those which did belong to another model."""
    listed = list(keys)
    patterns = [_HALF_SHARED, *(pattern for pattern, _ in _others(weights, _SIBLINGS))]
    return any(re.search(pattern, key) for pattern in patterns for key in listed)


def _others(weights: Iterable[str], models: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """All but the one among the siblings that the model itself is."""
    own = list(weights)
    mine = [one for one in _SIBLINGS if any(re.search(one[0], name) for name in own)]
    return [model for model in models if model not in mine]
