"""A GGUF text encoder's tensors and settings under transformers' names. Renames; reads no file."""

import json
import re
from collections.abc import Mapping
from typing import Any

from .checkpoint import TensorEntry

# general.architecture of Qwen2.5-VL's language model; its text-only sisters have the same tensor names and shapes
TEXT_ARCHITECTURES = ("qwen2vl", "qwen25vl")

# llama.cpp (gguf-py/gguf/tensor_mapping.py, MODEL_ARCH.QWEN2VL) -> transformers' Qwen2_5_VLTextModel
_OUTSIDE = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def text_encoder_names(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The language model's tensors renamed; what it does not use (the output head, rotary factors) is left out."""
    return {new: entry for name, entry in tensors.items() if (new := _new_name(name)) is not None}


def text_encoder_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Those of transformers' Qwen2_5_VLTextConfig settings that a GGUF file states, as it states them."""
    architecture = metadata.get("general.architecture")

    def setting(key: str) -> Any:
        try:
            return json.loads(metadata.get(f"{architecture}.{key}", "null"))
        except ValueError:  # a text, where a number belongs
            return metadata[f"{architecture}.{key}"]

    sections = setting("rope.dimension_sections")  # time, height, width, and a zero
    return {
        "num_attention_heads": setting("attention.head_count"),
        "rms_norm_eps": setting("attention.layer_norm_rms_epsilon"),
        "rope_theta": setting("rope.freq_base"),
        "rope_parameters": {"mrope_section": sections[:3]} if isinstance(sections, list) else None,
    }


def _new_name(name: str) -> str | None:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None:
        return _OUTSIDE.get(name)
    index, part, kind = match.groups()
    return f"layers.{index}.{_IN_LAYER[part]}.{kind}" if part in _IN_LAYER else None
