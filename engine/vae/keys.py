"""Name a VAE's tensors as diffusers does (ComfyUI's names are Wan's), and say what a foreign VAE is."""

import re
from collections.abc import Mapping

import torch

from ..errors import WrongModel

LATENT_CHANNELS = 16
IMAGE_CHANNELS = 3

# Wan's name -> diffusers' name, applied in order (diffusers.loaders.single_file_utils.convert_wan_vae_to_diffusers)
_RENAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"^encoder\.downsamples\.", "encoder.down_blocks."),
    (r"\.residual\.0\.gamma$", ".norm1.gamma"),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.gamma$", ".norm2.gamma"),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def to_diffusers_names(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under diffusers' AutoencoderKLQwenImage names; those names pass through unchanged."""
    if "decoder.conv1.weight" not in state_dict:
        return dict(state_dict)
    # Wan numbers the decoder's residual blocks and upsamplers in one row; an upsampler ends each block of it
    ends = sorted(
        {int(key.split(".")[2]) for key in state_dict if re.match(r"decoder\.upsamples\.\d+\.resample\.", key)}
    )
    renamed = {}
    for key, tensor in state_dict.items():
        upsample = re.match(r"decoder\.upsamples\.(\d+)\.(.*)", key)
        name = key
        if upsample:
            index = int(upsample[1])
            block = sum(end < index for end in ends)
            place = "upsamplers.0" if index in ends else f"resnets.{index - (ends[block - 1] + 1 if block else 0)}"
            name = f"decoder.up_blocks.{block}.{place}.{upsample[2]}"
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def check_is_image_vae(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise WrongModel, saying what these tensors (diffusers' names) are, unless they are Qwen-Image's RGB VAE."""
    # its blocks are nested in a way that the names above leave over
    if any(".resnets.0.upsamples." in key for key in tensors):
        raise WrongModel("This is the Wan 2.2 VAE (48 latent channels). Qwen-Image needs qwen_image_vae.safetensors.")
    if "decoder.conv_norm_out.weight" in tensors or "decoder.norm_out.weight" in tensors:
        raise WrongModel(
            "This is a VAE of the Stable Diffusion or Flux kind. Qwen-Image needs qwen_image_vae.safetensors."
        )
    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight")
    missing = [key for key in needed if key not in tensors]
    if missing:
        found = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise WrongModel(
            f"This is not a Qwen-Image VAE: {missing[0]} is missing ({len(tensors)} tensors: {found}, ...). "
            "Qwen-Image needs qwen_image_vae.safetensors."
        )
    latent_channels = tensors["post_quant_conv.weight"].shape[0]
    image_channels = tensors["encoder.conv_in.weight"].shape[1]
    if latent_channels == 64:
        raise WrongModel(
            "This is Qwen-Image-2.1's VAE (64 latent channels, RGBA); only the 16-channel RGB VAE works here."
        )
    if latent_channels != LATENT_CHANNELS:
        raise WrongModel(f"This VAE has {latent_channels} latent channels; Qwen-Image's has {LATENT_CHANNELS}.")
    if image_channels == 4 or tensors["decoder.conv_out.weight"].shape[0] == 4:
        raise WrongModel("This is Qwen-Image-Layered's VAE (RGBA); only the RGB VAE of the other models works here.")
    if image_channels != IMAGE_CHANNELS or tensors["decoder.conv_in.weight"].ndim != 5:
        raise WrongModel(
            f"This VAE reads {image_channels} channels and is none of Qwen-Image's; use qwen_image_vae.safetensors."
        )
