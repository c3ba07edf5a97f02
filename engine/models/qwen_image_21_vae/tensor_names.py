"""Name the tensors of 2.1's VAE as diffusers does (ComfyUI's names are Wan 2.2's), and say what a foreign VAE is."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from ...errors import WrongModel
from ...files.checkpoint import Checkpoint, TensorEntry
from ..qwen_image_vae.tensor_names import MAX_WIDTH, rename, require_shapes, vae_tensors
from .shapes import DECODER_BLOCKS, ENCODER_BLOCKS, IMAGE_CHANNELS, LATENT_CHANNELS, image_vae_21_shapes

NAME = "qwen_image_2.1_vae_bf16.safetensors"

_T = TypeVar("_T")
# Wan 2.2 nests each level's layers; the last of a level changes the size
_LEVELS = {
    "encoder.downsamples": ("encoder.down_blocks", "downsampler", ENCODER_BLOCKS),
    "decoder.upsamples": ("decoder.up_blocks", "upsampler", DECODER_BLOCKS),
}
_NESTED = re.compile(r"^(encoder\.downsamples|decoder\.upsamples)\.(\d{1,9})\.(?:down|up)samples\.(\d{1,9})\.(.*)")


def to_diffusers_names(state_dict: Mapping[str, _T]) -> dict[str, _T]:
    """The same tensors under diffusers' AutoencoderKLQwenImage21 names; those names pass through unchanged."""
    if "decoder.conv1.weight" not in state_dict:
        return dict(state_dict)
    return {rename(_level(name)): tensor for name, tensor in state_dict.items()}


def _level(name: str) -> str:
    nested = _NESTED.match(name)
    if nested is None:
        return name
    blocks, change, count = _LEVELS[nested[1]]
    index = int(nested[3])
    place = f"resnets.{index}" if index < count else change
    return f"{blocks}.{nested[2]}.{place}.{nested[4]}"


def check_is_image_vae_21(shapes: Mapping[str, Sequence[int]], where: str) -> dict[str, tuple[int, ...]]:
    """The needed tensors and their shapes, as (out, in, k, k). Raises WrongModel unless these (diffusers' names) are
    those of 2.1's VAE of any width; DamagedFile where one is missing. `where` names the file."""
    wanted = ("post_quant_conv.weight", "encoder.conv_in.weight", "decoder.conv_out.weight")
    latent, first, last = (tuple(shapes.get(name, ())) for name in wanted)
    if any(len(shape) < 4 or 0 in shape for shape in (latent, first, last)):
        found = ", ".join(repr(name) for name in sorted(shapes)[:3]) or "nothing"
        raise WrongModel(
            "{file} is not Qwen-Image-2.1's VAE ({tensor_count} tensors: {found}, ...). Use {example}.",
            code="vae_21.is_none",
            file=where,
            tensor_count=len(shapes),
            found=found,
            example=NAME,
        )
    channels = latent[0], first[1], last[0]
    widths = first[0], last[1]
    if channels != (LATENT_CHANNELS, IMAGE_CHANNELS, IMAGE_CHANNELS) or max(widths) > MAX_WIDTH:
        raise WrongModel(
            "{file} is another model's VAE: it has {latents} latent channels, reads {read} and draws {drawn} "
            "channels; Qwen-Image-2.1's has {needed} latent channels and makes RGBA images. Use {example}.",
            code="vae_21.other_channels",
            file=where,
            latents=channels[0],
            read=channels[1],
            drawn=channels[2],
            needed=LATENT_CHANNELS,
            example=NAME,
        )
    needed = image_vae_21_shapes(*widths)
    require_shapes(shapes, needed, where, "Qwen-Image-2.1's VAE", NAME, _of_one_frame)
    return needed


def require_image_vae_21(checkpoint: Checkpoint) -> None:
    """Raise WrongModel or DamagedFile unless the file holds 2.1's VAE, from its header alone."""
    needed_tensors(checkpoint)


def needed_tensors(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """What an image needs of the file, under diffusers' names. Raises as `require_image_vae_21` does."""
    entries = to_diffusers_names(vae_tensors(checkpoint))
    shapes = {name: entry.shape for name, entry in entries.items()}
    return {name: entries[name] for name in check_is_image_vae_21(shapes, str(checkpoint.path))}


def _of_one_frame(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel of images and one of videos that reaches over no time are the same; so are norms' numbers."""
    if len(shape) == 5 and shape[2] == 1:
        return shape[:2] + shape[3:]
    return shape[:1] if set(shape[1:]) == {1} and len(shape) in (3, 4) else shape
