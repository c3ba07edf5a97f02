"""Qwen-Image-2.1's transformer at its real size without its weights: a header only, in ComfyUI's layout."""

from math import prod
from pathlib import Path

import torch
from full_size import NAMES
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, TensorEntry
from qwenimage_lowvram.engine.models.qwen_image_21.layers import Block, Outside
from qwenimage_lowvram.engine.models.qwen_image_21.tensors import BLOCKS, TransformerConfig

CONFIG = TransformerConfig(
    layers=32, heads=32, head_dim=128, prompt_dim=4096, mlp_dim=12288, rope_axes=(16, 56, 56), joined=True
)


def transformer_21_checkpoint(dtype: torch.dtype = torch.bfloat16, *, layers: int = CONFIG.layers) -> Checkpoint:
    """Every matrix of a block in `dtype`, the rest in bf16 where dtype is fp8."""
    with torch.device("meta"):
        outside, block = Outside(CONFIG), Block(CONFIG)
    shapes = {name: tuple(p.shape) for name, p in outside.named_parameters()}
    for i in range(layers):
        shapes |= {f"{BLOCKS}{i}.{name}": tuple(p.shape) for name, p in block.named_parameters()}
    tensors = {}
    for name, shape in shapes.items():
        small = dtype.itemsize > 1 or not name.startswith(BLOCKS) or len(shape) == 1
        stored = torch.bfloat16 if small and dtype.itemsize == 1 else dtype
        tensors[name] = TensorEntry(Path("2.1"), 0, prod(shape) * stored.itemsize, NAMES[stored], shape)
    return Checkpoint(Path("2.1"), tensors, {}, None, "2.1")
