"""Qwen2.5-VL's language model as text encoder, made of transformers' own layers; states are those after its norm."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...files.checkpoint import Checkpoint
from ..qwen_vl import text_encoder
from ..qwen_vl.language_model import LanguageModel
from .tensors import sort_text_encoder
from .vision_tower import VisionTower

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLTextConfig


class TextEncoder(text_encoder.TextEncoder):
    """Of Qwen-Image."""

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
            make_norm=partial(_norm, config),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
        )


def _empty_layer(config: "Qwen2_5_VLTextConfig") -> nn.Module:
    with torch.device("meta"):
        layer = _network().Qwen2_5_VLDecoderLayer(config, 0).eval()
    return text_encoder.in_chunks(layer)


def _rotary(config: "Qwen2_5_VLTextConfig") -> nn.Module:
    made: nn.Module = _network().Qwen2_5_VLRotaryEmbedding(config)
    return made


def _norm(config: "Qwen2_5_VLTextConfig") -> nn.Module:
    """transformers before 5.2 has it under the name of the network that it was copied from."""
    network = _network()
    norm_class = getattr(network, "Qwen2_5_VLRMSNorm", None) or network.Qwen2RMSNorm
    norm: nn.Module = norm_class(config.hidden_size, eps=config.rms_norm_eps)
    return norm


def _network() -> Any:
    """transformers' modules of Qwen2.5-VL, imported when an encoder is opened: it takes seconds."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    return modeling_qwen2_5_vl


def _hf_config(config: Any) -> "Qwen2_5_VLTextConfig":
    from transformers import Qwen2_5_VLTextConfig

    # transformers 4 warns of a rope_theta among these, transformers 5 puts it there itself
    rope = {"type": "default", "rope_type": "default", "mrope_section": list(config["mrope_section"])}
    own = ("rope_theta", "mrope_section")
    result = Qwen2_5_VLTextConfig(
        **{key: value for key, value in config.items() if key not in own},
        bos_token_id=None,
        eos_token_id=None,
        rope_theta=config["rope_theta"],
        rope_scaling=rope,
    )
    result._attn_implementation = "sdpa"
    return result
