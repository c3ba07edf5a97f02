"""A custom node of test servers, without nodes: ComfyUI's own loaders open Qwen-Image files of small sizes.

ComfyUI has most sizes as constants. Here they come from the configuration in the file's metadata, where there is one
(tools/split_files.py writes it); what the loaded models then compute is ComfyUI's own.
"""

import json
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import comfy.model_detection
import comfy.sd
import comfy.text_encoders.llama as llama
import comfy.text_encoders.qwen_vl as qwen_vl
from safetensors import safe_open

NODE_CLASS_MAPPINGS: dict[str, Any] = {}

_TRANSFORMER = ("attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope")
_TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip
_VISION = ("hidden_size", "intermediate_size", "num_heads")

_detect_unet = comfy.model_detection.detect_unet_config
_load_clip = comfy.sd.load_clip
_TextConfig = llama.Qwen25_7BVLI_Config
_Tower = qwen_vl.Qwen2VLVisionTransformer


def detect_unet_config(state_dict: Any, key_prefix: str, metadata: Any = None) -> Any:
    """ComfyUI's, with the sizes that it does not read from shapes."""
    found = _detect_unet(state_dict, key_prefix, metadata=metadata)
    if found and found.get("image_model") == "qwen_image" and "config" in (metadata or {}):
        given = json.loads(metadata["config"])
        found |= {name: given[name] for name in _TRANSFORMER}
    return found


def load_clip(ckpt_paths: list[str], *args: Any, **kwargs: Any) -> Any:
    """ComfyUI's, with its constants changed while it builds the encoder."""
    config = _config(ckpt_paths[0])
    if "text_config" not in config:
        return _load_clip(ckpt_paths, *args, **kwargs)
    text, vision = config["text_config"], config["vision_config"]

    def text_config(**given: Any) -> Any:
        made = _TextConfig(**{name: text[name] for name in _TEXT}, **given)
        made.head_dim = text["hidden_size"] // text["num_attention_heads"]
        made.rope_dims = text["rope_parameters"]["mrope_section"]
        return made

    def tower(**given: Any) -> Any:
        made = _Tower(**given | {name: vision[name] for name in _VISION}, num_layers=vision["depth"])
        made.fullatt_block_indexes = vision["fullatt_block_indexes"]
        return made

    with ExitStack() as stack:
        for owner, name, value in (
            (llama, "Qwen25_7BVLI_Config", text_config),
            (qwen_vl, "Qwen2VLVisionTransformer", tower),
            (comfy.sd, "detect_te_model", lambda weights: comfy.sd.TEModel.QWEN25_7B),
        ):
            stack.enter_context(patch.object(owner, name, value))
        return _load_clip(ckpt_paths, *args, **kwargs)


def _config(file: str) -> dict[str, Any]:
    if not file.endswith(".safetensors"):
        return {}
    with safe_open(file, framework="pt") as opened:
        config: dict[str, Any] = json.loads((opened.metadata() or {}).get("config", "{}"))
    return config


comfy.model_detection.detect_unet_config = detect_unet_config
comfy.sd.load_clip = load_clip
