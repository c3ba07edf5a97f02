"""Name a VAE's tensors as diffusers does (ComfyUI's names are Wan's), and say what a foreign VAE is."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from ...errors import DamagedFile, WrongModel
from ...files.checkpoint import Checkpoint, TensorEntry
from ..prefixes import find_prefix, under_prefix
from .component import VAE
from .shapes import LATENT_CHANNELS, image_vae_shapes

# of the images that a VAE reads and draws -> its published name; four: Qwen-Image-Layered's, with alpha
NAMES = {3: "qwen_image_vae.safetensors", 4: "qwen_image_layered_vae.safetensors"}
RGB, RGBA = NAMES
NAME = NAMES[RGB]
UPSCALING = 2  # of decoders that are trained to draw each pixel as 2x2 ones
MAX_WIDTH = 1024  # channels next to the image; the published one has 96

_ENDS = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight")
_T = TypeVar("_T")

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


def to_diffusers_names(state_dict: Mapping[str, _T]) -> dict[str, _T]:
    """The same tensors under diffusers' AutoencoderKLQwenImage names; those names pass through unchanged."""
    if "decoder.conv1.weight" not in state_dict:
        return dict(state_dict)
    # Wan numbers the decoder's residual blocks and upsamplers in one row; an upsampler ends each block of it
    ends = sorted(
        {int(match[1]) for key in state_dict if (match := re.match(r"decoder\.upsamples\.(\d{1,9})\.resample\.", key))}
    )
    renamed = {}
    for key, tensor in state_dict.items():
        upsample = re.match(r"decoder\.upsamples\.(\d{1,9})\.(.*)", key)
        name = key
        if upsample:
            index = int(upsample[1])
            block = sum(end < index for end in ends)
            place = "upsamplers.0" if index in ends else f"resnets.{index - (ends[block - 1] + 1 if block else 0)}"
            name = f"decoder.up_blocks.{block}.{place}.{upsample[2]}"
        renamed[rename(name)] = tensor
    return renamed


def rename(name: str) -> str:
    """Wan's name as diffusers has it, but for the numbers of its levels."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def check_is_image_vae(shapes: Mapping[str, Sequence[int]], where: str) -> int:
    """How many channels its images have: RGB or RGBA.

    Raises WrongModel, saying what the tensors of these shapes (diffusers' names) are, unless they are Qwen-Image's or
    Qwen-Image-Layered's VAE of any width; DamagedFile where one is missing. `where` names the file.
    """
    use = f"Use {NAME}."
    if tuple(shapes.get("post_quant_conv.weight", ()))[:1] == (64,):
        raise WrongModel(
            "{file} is Qwen-Image-2.1's VAE (64 latent channels, RGBA). {use}",
            code="vae.qwen_image_21",
            file=where,
            use=use,
        )
    # its blocks are nested in a way that the names above leave over
    if any(".resnets.0.upsamples." in name for name in shapes):
        raise WrongModel(
            "{file} is the Wan 2.2 VAE (48 latent channels). {use}", code="vae.wan_22", file=where, use=use
        )
    if "decoder.conv_norm_out.weight" in shapes or "decoder.norm_out.weight" in shapes:
        raise WrongModel(
            "{file} is a Stable Diffusion or Flux VAE. {use}",
            code="vae.stable_diffusion_or_flux",
            file=where,
            use=use,
        )
    ends = {name: tuple(shapes.get(name, ())) for name in _ENDS}
    strange = [name for name, shape in ends.items() if len(shape) < 4 or 0 in shape]
    if strange:
        found = ", ".join(repr(name) for name in sorted(shapes)[:3]) or "nothing"
        raise WrongModel(
            "{file} is not a Qwen-Image VAE: {name} {shape} ({tensor_count} tensors: {found}, ...). {use}",
            code="vae.is_none",
            file=where,
            name=strange[0],
            shape=list(ends[strange[0]]) or "is missing",
            tensor_count=len(shapes),
            found=found,
            use=use,
        )
    latent_channels, image_channels = ends["post_quant_conv.weight"][0], ends["encoder.conv_in.weight"][1]
    drawn_channels, width = ends["decoder.conv_out.weight"][:2]
    if latent_channels != LATENT_CHANNELS:
        raise WrongModel(
            "{file} has {channels} latent channels; Qwen-Image's VAE has {needed}. {use}",
            code="vae.other_latent_channels",
            file=where,
            channels=latent_channels,
            needed=LATENT_CHANNELS,
            use=use,
        )
    if drawn_channels == image_channels * UPSCALING**2:
        raise WrongModel(
            "{file} is a VAE that upscales (it draws {channels} channels for {times} times the size). {use}",
            code="vae.upscales",
            file=where,
            channels=drawn_channels,
            times=UPSCALING,
            use=use,
        )
    if image_channels != drawn_channels or image_channels not in NAMES or width > MAX_WIDTH:
        raise WrongModel(
            "{file} reads {image_channels} channels, draws {drawn_channels} and is {width} wide, unlike any of "
            "Qwen-Image's VAEs. {use}",
            code="vae.other_channels",
            file=where,
            image_channels=image_channels,
            drawn_channels=drawn_channels,
            width=width,
            use=use,
        )
    require_shapes(shapes, image_vae_shapes(width, image_channels), where, "a Qwen-Image VAE", NAME)
    return image_channels


def require_shapes(
    shapes: Mapping[str, Sequence[int]],
    needed: Mapping[str, tuple[int, ...]],
    where: str,
    model: str,
    example: str,
    alike: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple,
) -> None:
    """Raise DamagedFile for a tensor that is missing, WrongModel for one of another shape. `alike`: a shape as those
    are written that are the same in other words."""
    for name, shape in needed.items():
        if name not in shapes:
            raise DamagedFile(
                "{file} has no tensor {name}: the file is incomplete or mixed up. Download it again.",
                code="vae.lacks_tensor",
                file=where,
                name=name,
            )
        if alike(tuple(shapes[name])) != alike(shape):
            raise WrongModel(
                "{file} is not {model}: {name} {shape}, not {needed_shape}. Use {example}.",
                code="vae.other_shape",
                file=where,
                model=model,
                name=name,
                shape=list(shapes[name]),
                needed_shape=list(shape),
                example=example,
            )


def require_image_vae(checkpoint: Checkpoint, *, channels: int | None = None) -> None:
    """Raise WrongModel or DamagedFile unless the file holds the VAE of images of so many channels (None: RGB or
    RGBA), from its header alone."""
    found = check_is_image_vae(_shapes(to_diffusers_names(vae_tensors(checkpoint))), str(checkpoint.path))
    if channels not in (None, found):
        which = {RGB: "of the models that make whole images (RGB)", RGBA: "of Qwen-Image-Layered (RGBA)"}
        raise WrongModel(
            "{file} is the VAE {found}; the transformer needs the one {needed}. Use {example}.",
            code="vae.other_variant",
            file=checkpoint.path,
            found=which[found],
            needed=which[channels],
            example=NAMES[channels],
        )


def needed_tensors(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """What one frame needs of the file, under diffusers' names: no video tensors, nothing that strayed into it.

    Raises WrongModel or DamagedFile as `require_image_vae` does."""
    entries = to_diffusers_names(vae_tensors(checkpoint))
    shapes = _shapes(entries)
    channels = check_is_image_vae(shapes, str(checkpoint.path))
    return {name: entries[name] for name in image_vae_shapes(shapes["decoder.conv_out.weight"][1], channels)}


def _shapes(entries: Mapping[str, TensorEntry]) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in entries.items()}


def vae_tensors(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """A VAE's tensors under its own names, whichever program wrote them; all of the file's where no VAE is known."""
    return under_prefix(checkpoint.tensors, find_prefix(checkpoint.tensors, VAE.anchors) or "")
