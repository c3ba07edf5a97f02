"""Qwen3-VL-8B's language model at its real size without its weights: headers only (see full_size.py)."""

import torch
from full_size import checkpoint_of
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint
from transformers import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

HIDDEN, VOCABULARY = 4096, 151_936


def text_encoder_checkpoint(
    dtype: torch.dtype = torch.bfloat16, *, layers: int = 36, hidden: int = HIDDEN
) -> Checkpoint:
    """Matrices of layers in `dtype`, as `checkpoint_of` has them; another `hidden` is another size of Qwen3-VL."""
    config = Qwen3VLTextConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_attention_heads=hidden // 128, num_key_value_heads=8
    )
    with torch.device("meta"):
        layer = Qwen3VLTextDecoderLayer(config, 0)
    start = "model.language_model."
    shapes = {
        f"{start}layers.{i}.{name}": tuple(p.shape) for i in range(layers) for name, p in layer.named_parameters()
    }
    shapes |= {f"{start}embed_tokens.weight": (VOCABULARY, hidden), f"{start}norm.weight": (hidden,)}
    shapes["model.visual.deepstack_merger_list.0.norm.weight"] = (4608,)
    return checkpoint_of("text_encoder", shapes, dtype)
