"""The node that encodes an edit: prompts and images to conditions, and an empty latent on the same grid."""

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import node_helpers
import torch
from torch import Tensor

from ..engine.errors import InvalidRequest
from ..engine.models.qwen25_vl.vision_patches import require_rgb
from ..engine.models.qwen_image.edit_sizes import MOST_IMAGES, EditSizes, plan_sizes
from ..engine.models.qwen_image.latents import LATENT_PX
from ..engine.models.qwen_image.prompt_template import EDIT_TEMPLATE
from ..engine.models.qwen_image.prompts import with_places
from ..engine.models.qwen_image.resample import resample
from ..engine.models.qwen_image.variants import Variant
from ..engine.runs.free_memory import check_room
from .adapters.clip import LowVRAMCLIP
from .adapters.graph_checks import NO_IMAGES_KEY
from .adapters.value_checks import check_image, check_widgets
from .display_names import AUTO, CATEGORY

LATENT_CHANNELS = 16
_SMALLER = "Use a smaller batch_size, or a smaller output."
VARIANTS: dict[str, Variant | None] = {AUTO: None} | {variant.value: variant for variant in Variant if variant.edits}


class QwenLowVRAMEncodeEditPrompt:
    """Encode Edit Prompt."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows one to three images to Qwen-Image-Edit. Both prompts and all images take one visit of the text "
        "encoder; image and output lie on one pixel grid, so that what is kept stays where it is."
    )
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")
    OUTPUT_TOOLTIPS = (
        "What should change, with the images.",
        "What should not be there, with the same images; used only where cfg is above 1.",
        "Empty, of the output's size: for the sampler.",
    )
    SEARCH_ALIASES = ("edit", "image edit", "TextEncodeQwenImageEditPlus", "reference", "qwen", "kontext")
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = {"multiline": True, "dynamicPrompts": True}
        side = {"default": 0, "min": 0, "max": 16384, "step": 16}
        image = "Call it Picture {} in the prompt. Inputs that are left free are not counted."
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "The text encoder: this pack's, or ComfyUI's own."}),
                "vae": ("VAE", {"tooltip": "Encodes the images for the model: this pack's, or ComfyUI's own."}),
                "positive": ("STRING", {**text, "default": "", "tooltip": "What to change in the image, in words."}),
                "negative": (
                    "STRING",
                    {**text, "default": " ", "tooltip": "What it should not show. A space is the model's own default."},
                ),
                "megapixels": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 16.0,
                        "step": 0.05,
                        "tooltip": "Of each image as the model is shown it, and of the output. 1: as it was trained. "
                        "0: the image's own size, to the nearest multiple of 16.",
                    },
                ),
                "width": ("INT", {**side, "tooltip": "Of the output. 0: as picture 1."}),
                "height": ("INT", {**side, "tooltip": "Of the output. 0: as picture 1."}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64, "tooltip": "Images made at a time."}),
                "variant": (
                    list(VARIANTS),
                    {
                        "default": AUTO,
                        "advanced": True,
                        "tooltip": "Which model the prompt is for; Edit shows its one image in another way than the "
                        "later ones. auto: the loader's, else Edit-2509.",
                    },
                ),
            },
            "optional": {
                f"image{i + 1}": (
                    "IMAGE",
                    {"tooltip": "The image to change; the output has its size." if i == 0 else image.format(i + 1)},
                )
                for i in range(MOST_IMAGES)
            },
        }

    def encode(
        self,
        clip: Any,
        vae: Any,
        positive: str,
        negative: str,
        megapixels: float,
        width: int,
        height: int,
        batch_size: int,
        variant: str,
        **images: Any,
    ) -> dict[str, Any]:
        check_widgets(
            self.INPUT_TYPES(),
            clip=clip,
            vae=vae,
            positive=positive,
            negative=negative,
            megapixels=megapixels,
            width=width,
            height=height,
            batch_size=batch_size,
            variant=variant,
        )
        for name, image in images.items():
            if image is not None:
                check_image(name, image)
        given = [images[name] for name in sorted(images) if images[name] is not None]
        for i, image in enumerate(given, start=1):
            require_rgb(image, f"Picture {i}")
        member = _member(clip, variant)
        sizes = plan_sizes(
            [(image.shape[2], image.shape[1]) for image in given],
            member,
            megapixels=megapixels,
            output=_output(width, height),
        )
        texts = [with_places(text, len(given), labelled=member.labels_images) for text in (positive, negative)]
        seen = [resample(image, *size.seen) for image, size in zip(given, sizes.images, strict=True)]
        conditions = _encoded(clip, texts, seen)
        values: dict[str, Any] = {NO_IMAGES_KEY: True}
        if given:
            shown = zip(given, sizes.images, strict=True)
            values = {"reference_latents": [vae.encode(resample(image, *size.reference)) for image, size in shown]}
        conditions = [node_helpers.conditioning_set_values(condition, values, append=True) for condition in conditions]
        return {"ui": {"text": [str(sizes)]}, "result": (*conditions, _empty_latent(sizes, batch_size))}


def _member(clip: Any, variant: str) -> Variant:
    """Which model the prompts are for. A text-to-image model that is shown images takes them as Edit-2509 does."""
    opened = clip.variant if isinstance(clip, LowVRAMCLIP) else None
    return (VARIANTS[variant] or opened or Variant.QWEN_IMAGE).when_shown_images


def _output(width: int, height: int) -> tuple[int, int] | None:
    if bool(width) != bool(height):
        raise InvalidRequest(
            "The output is {width}x{height} px. Give both width and height, or leave both 0 for the size of picture 1.",
            code="edit.one_side_given",
            width=width,
            height=height,
        )
    return (width, height) if width else None


def _encoded(clip: Any, texts: Sequence[str], seen: Sequence[Tensor]) -> list[Any]:
    if isinstance(clip, LowVRAMCLIP):
        return clip.encode_prompts(texts, template=EDIT_TEMPLATE, images=seen)
    tokens = [clip.tokenize(text, images=list(seen), llama_template=EDIT_TEMPLATE) for text in texts]
    return [clip.encode_from_tokens_scheduled(each) for each in tokens]


def _empty_latent(sizes: EditSizes, batch_size: int) -> dict[str, Any]:
    width, height = (side // LATENT_PX for side in sizes.output)
    device = comfy.model_management.intermediate_device()
    nbytes = batch_size * LATENT_CHANNELS * height * width * 4
    check_room(nbytes, f"An empty latent of {batch_size} images of {sizes.output[0]}x{sizes.output[1]} px", _SMALLER)
    samples = torch.zeros(batch_size, LATENT_CHANNELS, 1, height, width, device=device)
    return {"samples": samples, "downscale_ratio_spacial": LATENT_PX}
