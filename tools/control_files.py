"""Write small ControlNets and model patches for a small transformer, in the key names of the real files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FUN_BLOCKS = 5  # ComfyUI knows no other number


def write_instantx(file: Path, transformer: Path, *, layers: int, mask_channels: int = 0, seed: int = 11) -> Path:
    """InstantX's ControlNet as diffusers saves it: `layers` residuals; with mask_channels=4 the inpainting one."""
    from diffusers import QwenImageControlNetModel

    config = _config(transformer)
    model = QwenImageControlNetModel(
        in_channels=64,
        num_layers=layers,
        attention_head_dim=config["attention_head_dim"],
        num_attention_heads=config["num_attention_heads"],
        joint_attention_dim=config["joint_attention_dim"],
        axes_dims_rope=tuple(config["axes_dims_rope"]),
        extra_condition_channels=mask_channels,
    )
    return _write(file, _shapes(model), seed)


def write_fun(file: Path, transformer: Path, *, seed: int = 12) -> Path:
    """The Fun ControlNet: blocks of the transformer's kind with a way in and a way out, 33 latent channels."""
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    config = _config(transformer)
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    width = heads * head_dim
    with torch.device("meta"):
        block = QwenImageTransformerBlock(dim=width, num_attention_heads=heads, attention_head_dim=head_dim)
    square = {"weight": (width, width), "bias": (width,)}
    shapes: dict[str, tuple[int, ...]] = {"control_img_in.weight": (width, 132), "control_img_in.bias": (width,)}
    for i in range(FUN_BLOCKS):
        shapes |= {f"control_blocks.{i}.{name}": shape for name, shape in _shapes(block).items()}
        ways = ("before_proj", "after_proj") if i == 0 else ("after_proj",)
        shapes |= {f"control_blocks.{i}.{way}.{part}": shape for way in ways for part, shape in square.items()}
    return _write(file, shapes, seed)


def write_diffsynth(file: Path, transformer: Path, *, mask_channels: int = 0, seed: int = 13) -> Path:
    """DiffSynth's blockwise control: two layers behind each block of the transformer."""
    config = _config(transformer)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"img_in.weight": (width, 64 + mask_channels), "img_in.bias": (width,)}
    for i in range(config["num_layers"]):
        part = f"controlnet_blocks.{i}."
        shapes |= {f"{part}{norm}.weight": (width,) for norm in ("x_rms", "y_rms")}
        for layer in ("input_proj", "output_proj"):
            shapes |= {f"{part}{layer}.weight": (width, width), f"{part}{layer}.bias": (width,)}
    return _write(file, shapes, seed)


def _config(transformer: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((transformer / "config.json").read_text(encoding="utf-8"))
    return config


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _write(file: Path, shapes: Mapping[str, tuple[int, ...]], seed: int) -> Path:
    """Random weights scaled by their fan-in, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[name] = noise / shape[1] ** 0.5
        else:
            weights[name] = 0.05 * noise if name.endswith("bias") else 1 + 0.1 * noise
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, metadata={"format": "pt"})
    return file
