"""Let ComfyUI's own loaders open Qwen-Image files of small sizes; what is loaded then computes as ComfyUI does.

Most sizes are constants there. Here the transformer's come from its shapes, the text encoder's from the configuration
in the file's metadata (tools/split_files.py writes it). In a test's process, or in a real server through a custom node.
"""

import json
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import comfy.model_detection
import comfy.sd
import comfy.text_encoders.llama as llama
import comfy.text_encoders.qwen_vl as qwen_vl
from safetensors import safe_open

_ROPE_AXES = {32: [4, 14, 14], 64: [8, 28, 28], 128: [16, 56, 56]}
_TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip
_VISION = ("hidden_size", "intermediate_size", "num_heads")


def teach_transformer() -> None:
    """From now on, in this process."""
    detect = comfy.model_detection.detect_unet_config

    def detect_with_sizes(state_dict: Any, key_prefix: str, *args: Any, **kwargs: Any) -> Any:
        config = detect(state_dict, key_prefix, *args, **kwargs)
        if config is not None and config.get("image_model") == "qwen_image":
            head_dim = state_dict[f"{key_prefix}transformer_blocks.0.attn.norm_q.weight"].shape[0]
            config["attention_head_dim"] = head_dim
            config["num_attention_heads"] = state_dict[f"{key_prefix}img_in.weight"].shape[0] // head_dim
            config["joint_attention_dim"] = state_dict[f"{key_prefix}txt_norm.weight"].shape[0]
            config["axes_dims_rope"] = _ROPE_AXES[head_dim]
        return config

    comfy.model_detection.detect_unet_config = detect_with_sizes


def teach_patches(loader: type, *, layers: int, width: int) -> None:
    """Let ComfyUI's ModelPatchLoader open DiffSynth patches of this size. Its class is the one that a graph runs."""
    names = loader.load_model_patch.__globals__  # type: ignore[attr-defined]
    names["QwenImageBlockWiseControlNet"] = partial(names["QwenImageBlockWiseControlNet"], num_layers=layers, dim=width)


def teach_text_encoder() -> None:
    """From now on, in this process: ComfyUI's constants are others while it builds an encoder."""
    load, make_config, make_tower = comfy.sd.load_clip, llama.Qwen25_7BVLI_Config, qwen_vl.Qwen2VLVisionTransformer

    def load_with_sizes(ckpt_paths: list[str], *args: Any, **kwargs: Any) -> Any:
        config = _config(ckpt_paths[0])
        if "text_config" not in config:
            return load(ckpt_paths, *args, **kwargs)
        text, vision = config["text_config"], config["vision_config"]

        def text_config(**given: Any) -> Any:
            made = make_config(**{name: text[name] for name in _TEXT}, **given)
            made.head_dim = text["hidden_size"] // text["num_attention_heads"]
            made.rope_dims = text["rope_parameters"]["mrope_section"]
            return made

        def tower(**given: Any) -> Any:
            made = make_tower(**given | {name: vision[name] for name in _VISION}, num_layers=vision["depth"])
            made.fullatt_block_indexes = vision["fullatt_block_indexes"]
            return made

        with ExitStack() as stack:
            for owner, name, value in (
                (llama, "Qwen25_7BVLI_Config", text_config),
                (qwen_vl, "Qwen2VLVisionTransformer", tower),
                (comfy.sd, "detect_te_model", lambda weights: comfy.sd.TEModel.QWEN25_7B),
            ):
                stack.enter_context(patch.object(owner, name, value))
            return load(ckpt_paths, *args, **kwargs)

    comfy.sd.load_clip = load_with_sizes


def _config(file: str) -> dict[str, Any]:
    if not file.endswith(".safetensors"):
        return {}
    with safe_open(file, framework="pt") as opened:
        config: dict[str, Any] = json.loads((opened.metadata() or {}).get("config", "{}"))
    return config
