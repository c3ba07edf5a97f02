"""Qwen-Image-2.1's transformer and VAE at their real size without weights: headers only."""

from math import prod
from pathlib import Path

import torch
from full_size import NAMES, checkpoint_of
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, TensorEntry
from qwenimage_lowvram.engine.models.qwen_image_21.layers import Block, Outside
from qwenimage_lowvram.engine.models.qwen_image_21.tensors import BLOCKS, TransformerConfig
from qwenimage_lowvram.engine.models.qwen_image_21_vae.shapes import image_vae_21_shapes

CONFIG = TransformerConfig(
    layers=32, heads=32, head_dim=128, prompt_dim=4096, mlp_dim=12288, rope_axes=(16, 56, 56), joined=True
)
VAE_WIDTHS = 96, 144  # of encoder and decoder


def transformer_21_checkpoint(dtype: torch.dtype = torch.bfloat16, *, layers: int = CONFIG.layers) -> Checkpoint:
    """In ComfyUI's layout: every matrix of a block in `dtype`, the rest in bf16 where dtype is fp8."""
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


def vae_21_checkpoint() -> Checkpoint:
    """In bf16, by diffusers' names."""
    return checkpoint_of("vae", image_vae_21_shapes(*VAE_WIDTHS), torch.bfloat16)
