"""Build 2.1's decoder and encoder from diffusers' tensors."""

from collections.abc import Mapping

import torch
from torch import nn

from ..qwen_image_vae.layers import Conv, Downsample, Upsample
from ..qwen_image_vae.network import Half, Parts
from .levels import DownLevel, FlatLevel, UpLevel
from .shapes import DECODER_BLOCKS, ENCODER_BLOCKS, HALVES_TIME, LEVELS


def build_decoder(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Half:
    """Latents -> RGBA in -1..1: the middle block whole, the levels local."""
    parts = Parts(tensors, dtype)
    whole = [parts.conv("post_quant_conv"), parts.conv("decoder.conv_in"), *parts.middle("decoder.mid_block")]
    local: list[nn.Module] = []
    for level in range(len(LEVELS)):
        name = f"decoder.up_blocks.{level}"
        blocks: list[nn.Module] = [parts.residual(f"{name}.resnets.{i}") for i in range(DECODER_BLOCKS)]
        if level < len(HALVES_TIME):
            upsample = Upsample(*parts.folded(f"{name}.upsampler.resample.1"))
            local.append(UpLevel([*blocks, upsample], doubles_time=HALVES_TIME[-1 - level]))
        else:
            local += blocks
    local += [parts.norm_silu("decoder.norm_out"), parts.conv("decoder.conv_out")]
    return Half(whole, local, is_encoder=False)


def build_encoder(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Half:
    """RGBA in -1..1 -> the mean of the posterior: the levels local, the middle block whole."""
    parts = Parts(tensors, dtype)
    local: list[nn.Module] = [parts.conv("encoder.conv_in")]
    for level in range(len(LEVELS)):
        name = f"encoder.down_blocks.{level}"
        blocks: list[nn.Module] = [parts.residual(f"{name}.resnets.{i}") for i in range(ENCODER_BLOCKS)]
        if level < len(HALVES_TIME):
            downsample = Downsample(*parts.folded(f"{name}.downsampler.resample.1"))
            local.append(DownLevel([*blocks, downsample], halves_time=HALVES_TIME[level]))
        else:
            local.append(FlatLevel(blocks))
    weight, bias = parts.folded("quant_conv")
    mean = Conv(weight[: weight.shape[0] // 2].clone(), bias[: bias.shape[0] // 2].clone())
    head = [parts.norm_silu("encoder.norm_out"), parts.conv("encoder.conv_out"), mean]
    return Half([*parts.middle("encoder.mid_block"), *head], local, is_encoder=True)
