"""Qwen3-VL's language model as text encoder, made of transformers' own layers; states are those before its norm."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...files.checkpoint import Checkpoint
from ..qwen_vl import text_encoder
from ..qwen_vl.language_model import LanguageModel
from .costs import ATTENTION_STATES
from .tensors import sort_text_encoder
from .vision_tower import VisionTower

if TYPE_CHECKING:
    from transformers import Qwen3VLTextConfig


class TextEncoder(text_encoder.TextEncoder):
    """Of Qwen-Image-2.1, which reads what the last layer makes, before the final norm."""

    tower = VisionTower

    @staticmethod
    def language_model(checkpoint: Checkpoint) -> LanguageModel:
        tensors = sort_text_encoder(checkpoint)
        config = _hf_config(tensors.config)
        return LanguageModel(
            outside=tensors.outside,
            layers=tensors.layers,
            make_layer=partial(_empty_layer, config),
            make_rotary=partial(_rotary, config),
            make_norm=None,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            attention_states=ATTENTION_STATES,
        )


def _empty_layer(config: "Qwen3VLTextConfig") -> nn.Module:
    with torch.device("meta"):
        layer = _network().Qwen3VLTextDecoderLayer(config, 0).eval()
    return text_encoder.in_chunks(layer)


def _rotary(config: "Qwen3VLTextConfig") -> nn.Module:
    made: nn.Module = _network().Qwen3VLTextRotaryEmbedding(config)
    return made


def _network() -> Any:
    """transformers' modules of Qwen3-VL, imported when an encoder is opened: it takes seconds."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl

    return modeling_qwen3_vl


def _hf_config(config: Mapping[str, Any]) -> "Qwen3VLTextConfig":
    from transformers import Qwen3VLTextConfig

    rope = {"type": "default", "rope_type": "default", "mrope_section": list(config["mrope_section"])}
    own = ("rope_theta", "mrope_section")
    result = Qwen3VLTextConfig(
        **{key: value for key, value in config.items() if key not in own},
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        rope_theta=config["rope_theta"],
        rope_scaling=rope,
    )
    result._attn_implementation = "sdpa"
    return result
