"""Images to the patches that Qwen3-VL's vision part reads: size, background, normalisation, order. Holds no weights.

Images are resized and laid on white as the reference does it, in 8 bits (diffusers pipeline_qwenimage21.py).
"""

import torch
from PIL import Image
from torch import Tensor

from ...errors import InvalidRequest
from ..qwen_vl.images import CHANNELS, FRAMES, PatchedImage
from ..qwen_vl.vision_files import MERGE

# Qwen/Qwen3-VL-8B-Instruct, preprocessor_config.json
PATCH_PX = 16
LEAST_PIXELS, MOST_PIXELS = 65_536, 16_777_216
# sides of what is read are multiples of this: one token of a prompt
TOKEN_PX = PATCH_PX * MERGE
_MODES = {3: "RGB", 4: "RGBA"}  # by channels


def resize_image(pixels: Tensor, width: int, height: int) -> Tensor:
    """(1, H, W, 3 or 4) in 0..1 -> (1, height, width, as many channels) in 0..1 in float32 on the host, by Lanczos in 8
    bits, colours weighted by their alpha; as it is where that is its size already. Both the vision part and the VAE
    are to be given the result. Raises InvalidRequest for what is no image."""
    require_image(pixels, "An image of the prompt")
    if tuple(pixels.shape[1:3]) == (height, width):
        return pixels
    return _pixels(_image(pixels).resize((width, height), Image.Resampling.LANCZOS))


def patch_image(pixels: Tensor) -> PatchedImage:
    """(1, H, W, 3 or 4) in 0..1; what is transparent is seen on white.

    An image whose sides are multiples of 32 px is not resized; another one is, to the nearest such size. Raises
    InvalidRequest for anything but one image in colours, or for one that is 200 times as long as wide.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    require_image(pixels, "An image in a prompt")
    height, width = pixels.shape[1:3]
    try:
        size = smart_resize(height, width, TOKEN_PX, LEAST_PIXELS, MOST_PIXELS)
    except ValueError as error:
        raise InvalidRequest(
            "An image of {width}x{height} px is too long and narrow for the model to see: one side may be at most 200 "
            "times the other. Crop it.",
            code="image.too_long_to_be_seen",
            width=width,
            height=height,
        ) from error
    image = _image(pixels)
    if size != (height, width):
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        image = white
    return PatchedImage(_patches(_levels(image)), size[0] // PATCH_PX, size[1] // PATCH_PX)


def require_image(pixels: Tensor, what: str) -> None:
    """Raise InvalidRequest unless `pixels` is one image (1, H, W, 3 or 4); `what` names it."""
    if pixels.ndim != 4 or pixels.shape[0] != 1 or pixels.shape[-1] not in _MODES or 0 in pixels.shape:
        raise InvalidRequest(
            "{image} has the shape {shape}; (1, height, width, 3), or 4 with transparency, is needed: one image. "
            "Choose one from a batch (ImageFromBatch), or give each its own input.",
            code="image.21_wrong_shape",
            image=what,
            shape=list(pixels.shape),
        )


def _image(pixels: Tensor) -> Image.Image:
    levels = (pixels[0].detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.contiguous().numpy(), mode=_MODES[levels.shape[-1]])


def _levels(image: Image.Image) -> Tensor:
    """(height, width, channels) uint8."""
    channels = len(image.getbands())
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, channels)


def _pixels(image: Image.Image) -> Tensor:
    return _levels(image).float().div(255).unsqueeze(0)


def _patches(levels: Tensor) -> Tensor:
    """(height, width, 3) uint8 -> (patches, 3 * 2 * 16 * 16) in float32 from -1 to 1, in the order in which they are
    merged; the two frames are the same."""
    height, width, _ = levels.shape
    rows, columns = height // TOKEN_PX, width // TOKEN_PX
    signed = (levels.float() - 127.5) / 127.5
    cut = signed.view(rows, MERGE, PATCH_PX, columns, MERGE, PATCH_PX, CHANNELS)
    ordered = cut.permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(5)  # row, column, row and column in it, channel, frame, y, x
    doubled = ordered.expand(-1, -1, -1, -1, -1, FRAMES, -1, -1)
    return doubled.reshape(rows * columns * MERGE**2, CHANNELS * FRAMES * PATCH_PX**2)
