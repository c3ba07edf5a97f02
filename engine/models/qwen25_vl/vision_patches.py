"""Images to the patches that the vision tower reads: size, normalisation, order. Holds no weights."""

from torch import Tensor
from torch.nn.functional import interpolate

from ...errors import InvalidRequest
from ..qwen_vl.images import CHANNELS, PatchedImage
from ..qwen_vl.vision_files import MERGE

# Qwen2.5-VL-7B-Instruct, preprocessor_config.json; the order of patches is the processor's own
PATCH_PX = 14
LEAST_PIXELS, MOST_PIXELS = 3136, 12_845_056
# sides of what is read are multiples of this: one token of a prompt
TOKEN_PX = PATCH_PX * MERGE

_KINDS = {1: "greyscale", 2: "greyscale with transparency", 4: "with transparency (RGBA)"}  # by channels


def patch_image(pixels: Tensor) -> PatchedImage:
    """(1, H, W, 3) in 0..1.

    An image whose sides are multiples of 28 px is not resampled; another one is, to the nearest such size, as
    ComfyUI's own encoder does it (bilinear). Raises InvalidRequest for anything but one RGB image, or for one that is
    200 times as long as wide.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

    require_rgb(pixels, "An image in a prompt")
    image = pixels[0].detach().float().cpu().movedim(-1, 0)
    height, width = image.shape[1:]
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
    if size != (height, width):
        image = interpolate(image.unsqueeze(0), size, mode="bilinear", align_corners=False)[0]
    processor = Qwen2VLImageProcessor(do_resize=False, do_rescale=False)
    patches = processor(images=[image], return_tensors="pt")["pixel_values"]
    return PatchedImage(patches.contiguous(), size[0] // PATCH_PX, size[1] // PATCH_PX)


def require_rgb(pixels: Tensor, what: str) -> None:
    """Raise InvalidRequest unless `pixels` is one image (1, H, W, 3); `what` names it."""
    if pixels.ndim != 4:
        raise InvalidRequest(
            "{image} has the shape {shape}; (1, height, width, 3) is needed.",
            code="image.wrong_shape",
            image=what,
            shape=list(pixels.shape),
        )
    images, height, width, channels = pixels.shape
    if images != 1:
        raise InvalidRequest(
            "{image} is a batch of {count} images; one is needed. Choose one (ImageFromBatch), or give each its own "
            "input.",
            code="image.is_batch",
            image=what,
            count=images,
        )
    if channels != CHANNELS:
        kind = _KINDS.get(channels, "unknown")
        raise InvalidRequest(
            "{image} ({width}x{height} px) has {channels} channel{plural}, {kind}; red, green and blue are needed. "
            "Convert it to RGB first: the Load Image node does this, and Split Image with Alpha removes transparency.",
            code="image.not_rgb",
            image=what,
            width=width,
            height=height,
            channels=channels,
            plural="s" if channels != 1 else "",
            kind=kind,
        )
