"""Make a small Qwen-Image-2.1 transformer of the real architecture with random weights, in both layouts of files."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from qwenimage_lowvram.engine.models.qwen_image_21.layers import Block, Outside
from qwenimage_lowvram.engine.models.qwen_image_21.tensors import JOINED_LAYER, SPLIT_LAYERS, TransformerConfig
from safetensors.torch import save_file
from torch import Tensor

LAYERS, PROMPT_DIM = 5, 48
ROPE_AXES = (4, 14, 14)  # as 16, 56, 56 of heads of 128: files do not state them
SMALL = TransformerConfig(
    layers=LAYERS, heads=4, head_dim=32, prompt_dim=PROMPT_DIM, mlp_dim=384, rope_axes=ROPE_AXES, joined=False
)


def random_weights(config: TransformerConfig = SMALL, *, seed: int = 0) -> dict[str, Tensor]:
    """fp32, by diffusers' names, scaled by their fan-in, so that activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        outside, block = Outside(config), Block(config)
    shapes = {name: p.shape for name, p in outside.named_parameters()}
    for i in range(config.layers):
        shapes |= {f"transformer_blocks.{i}.{name}": p.shape for name, p in block.named_parameters()}
    return {name: _random(name, shape, generator) for name, shape in shapes.items()}


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    numbers = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return numbers / shape[1] ** 0.5
    return numbers / 10 if "text_norm" in name else 1 + numbers / 10


def write_folder(folder: Path, weights: Mapping[str, Tensor], config: TransformerConfig = SMALL) -> Path:
    """As diffusers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "_class_name": "QwenImage21Transformer2DModel",
                "num_layers": config.layers,
                "attention_head_dim": config.head_dim,
                "num_attention_heads": config.heads,
                "context_in_dim": config.prompt_dim,
                "mlp_ratio": config.mlp_dim // config.inner_dim,
                "axes_dims_rope": list(config.rope_axes),
            }
        )
    )
    return folder


def joined(weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The same weights by the names of ComfyUI's files."""
    gate, proj = SPLIT_LAYERS
    result = {}
    for name, weight in weights.items():
        if f".{gate}." in name:
            result[f"{prefix}{name.replace(gate, JOINED_LAYER)}"] = torch.cat(
                [weight, weights[name.replace(gate, proj)]]
            )
        elif f".{proj}." not in name:
            result[f"{prefix}{name}"] = weight.clone()
    return result


def write_file(file: Path, weights: Mapping[str, Tensor], prefix: str = "") -> Path:
    """As ComfyUI's files have it. The rotary axes are not stated there: they follow from a head's size."""
    save_file(joined(weights, prefix), file)
    return file
