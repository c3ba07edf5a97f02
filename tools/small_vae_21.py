"""Small random VAEs of Qwen-Image-2.1, in diffusers' names and in ComfyUI's. Needs no diffusers."""

import json
import re
from math import prod
from pathlib import Path

import torch
from qwenimage_lowvram.engine.models.qwen_image_21_vae.latent_statistics import LATENTS_MEAN, LATENTS_STD
from qwenimage_lowvram.engine.models.qwen_image_21_vae.shapes import (
    DECODER_BLOCKS,
    ENCODER_BLOCKS,
    HALVES_TIME,
    IMAGE_CHANNELS,
    LATENT_CHANNELS,
    image_vae_21_shapes,
)
from safetensors.torch import save_file
from torch import Tensor

WIDTH, DECODER_WIDTH = 8, 12  # the published one has 96 and 144

_WAN = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"^(encoder|decoder)\.conv_in\.", r"\1.conv1."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.head.0."),
    (r"^(encoder|decoder)\.conv_out\.", r"\1.head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.downsamples.\1.downsamples."),
    (r"^encoder\.down_blocks\.(\d+)\.downsampler\.", rf"encoder.downsamples.\1.downsamples.{ENCODER_BLOCKS}."),
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.upsamples.\1.upsamples."),
    (r"^decoder\.up_blocks\.(\d+)\.upsampler\.", rf"decoder.upsamples.\1.upsamples.{DECODER_BLOCKS}."),
    (r"\.norm1\.gamma$", ".residual.0.gamma"),
    (r"\.conv1\.(?=weight|bias)(?<=\d\.conv1\.)", ".residual.2."),
    (r"\.norm2\.gamma$", ".residual.3.gamma"),
    (r"\.conv2\.(?=weight|bias)(?<=\d\.conv2\.)", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)


def random_vae_21(width: int = WIDTH, decoder_width: int = DECODER_WIDTH, seed: int = 1) -> dict[str, Tensor]:
    """Weights in fp32 under diffusers' names, whose images use the range and whose attention mixes the whole image;
    the kernels over time, which no image meets, are there too."""
    generator = torch.Generator().manual_seed(seed)
    shapes = image_vae_21_shapes(width, decoder_width)
    for level, halves in enumerate(HALVES_TIME):
        if halves:
            channels = shapes[f"encoder.down_blocks.{level}.downsampler.resample.1.bias"][0]
            shapes[f"encoder.down_blocks.{level}.downsampler.time_conv.weight"] = (channels, channels, 1, 1)
            shapes[f"encoder.down_blocks.{level}.downsampler.time_conv.bias"] = (channels,)
        if HALVES_TIME[-1 - level]:
            channels = shapes[f"decoder.up_blocks.{level}.upsampler.resample.1.bias"][0]
            shapes[f"decoder.up_blocks.{level}.upsampler.time_conv.weight"] = (2 * channels, channels, 1, 1)
            shapes[f"decoder.up_blocks.{level}.upsampler.time_conv.bias"] = (2 * channels,)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(".gamma"):
            weights[name] = 1 + 0.1 * noise
        elif name.endswith(".bias"):
            weights[name] = 0.05 * noise
        else:
            weights[name] = noise * (1.6 / prod(shape[1:])) ** 0.5
    weights["decoder.conv_out.weight"] *= 0.5
    return weights


def write_folder(folder: Path, weights: dict[str, Tensor]) -> Path:
    """As diffusers' save_pretrained writes it."""
    folder.mkdir(parents=True)
    config = {
        "_class_name": "AutoencoderKLQwenImage21",
        "base_dim": weights["encoder.conv_in.weight"].shape[0],
        "decoder_base_dim": weights["decoder.conv_out.weight"].shape[1],
        "z_dim": LATENT_CHANNELS,
        "in_channels": IMAGE_CHANNELS,
        "out_channels": IMAGE_CHANNELS,
        "latents_mean": LATENTS_MEAN,
        "latents_std": LATENTS_STD,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def write_file(file: Path, weights: dict[str, Tensor]) -> Path:
    """As ComfyUI's file has it: Wan 2.2's names, kernels with one step of time."""
    save_file({wan_name(name): _with_time(name, weight) for name, weight in weights.items()}, file)
    return file


def wan_name(name: str) -> str:
    """Of a tensor that diffusers calls so."""
    for pattern, replacement in _WAN:
        name = re.sub(pattern, replacement, name)
    return name


def _with_time(name: str, weight: Tensor) -> Tensor:
    over_time = weight.ndim == 4 and name.endswith(".weight") and "to_qkv" not in name and ".proj." not in name
    return weight.unsqueeze(2).contiguous() if over_time and "resample" not in name else weight
