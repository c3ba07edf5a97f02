"""The node that encodes an edit: prompts and images to conditions, and an empty latent on the same grid."""

from enum import Enum
from typing import Any

from ..engine.errors import InvalidRequest, WrongModel
from ..engine.models.qwen_image.edit_sizes import MOST_IMAGES
from ..engine.models.qwen_image.variants import Variant
from ..engine.texts import shown
from .adapters.clip import LowVRAMCLIP
from .adapters.edit_prompts import Edit
from .adapters.networks import SERVED, ServedFamily, served_member
from .adapters.value_checks import check_image, check_widgets
from .display_names import AUTO, CATEGORY
from .live_plan import refuse_what_cannot_run

INPUTS = 12  # the most that any model is shown
DEFAULT = Variant.QWEN_IMAGE  # where neither variant nor CLIP tells
VARIANTS: dict[str, Enum | None] = {AUTO: None} | {
    member.value: member for served in SERVED for member in served.family.members if member.edits
}


class QwenLowVRAMEncodeEditPrompt:
    """Encode Edit Prompt."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows one to three images to Qwen-Image-Edit, or up to twelve to Qwen-Image-2.1. Both prompts and all images "
        "are encoded in one pass through the text encoder; image and output share one pixel grid, so what is kept "
        "stays where it is."
    )
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")
    OUTPUT_TOOLTIPS = (
        "What should change, together with the images.",
        "What should not be there, together with the same images; used only if cfg is above 1.",
        "An empty latent of the output's size, for the sampler.",
    )
    SEARCH_ALIASES = ("edit", "image edit", "TextEncodeQwenImageEditPlus", "reference", "qwen", "kontext")
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = {"multiline": True, "dynamicPrompts": True}
        side = {"default": 0, "min": 0, "max": 16384, "step": 16}
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "The text encoder: this pack's, or ComfyUI's own."}),
                "vae": (
                    "VAE",
                    {"tooltip": "The VAE that encodes the images for the model: this pack's, or ComfyUI's own."},
                ),
                "positive": (
                    "STRING",
                    {**text, "default": "", "tooltip": "What to change in the image, described in words."},
                ),
                "negative": (
                    "STRING",
                    {
                        **text,
                        "default": " ",
                        "tooltip": "What the image should not show. The model's own default is a single space.",
                    },
                ),
                "megapixels": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 16.0,
                        "step": 0.05,
                        "tooltip": "The size in megapixels of each image as the model sees it, and of the output. 1 "
                        "is what the model was trained with (for a square image, Qwen-Image-2.1 uses 1056x1056, "
                        "because edits at 1024x1024 come out as near-copies). 0 keeps each image's own size, rounded "
                        "to a multiple of 16 pixels (Qwen-Image-2.1: 32).",
                    },
                ),
                "width": ("INT", {**side, "tooltip": "Width of the output in pixels. 0 uses the width of image 1."}),
                "height": ("INT", {**side, "tooltip": "Height of the output in pixels. 0 uses the height of image 1."}),
                "batch_size": (
                    "INT",
                    {"default": 1, "min": 1, "max": 64, "tooltip": "How many images are made at a time."},
                ),
                "variant": (
                    list(VARIANTS),
                    {
                        "default": AUTO,
                        "advanced": True,
                        "tooltip": "Which model the prompt is for; Edit sees its one image in a different way from "
                        "later versions. auto uses the loader's model, or Edit-2509 with another loader's text "
                        "encoder.",
                    },
                ),
            },
            "optional": {
                f"image{i + 1}": (
                    "IMAGE",
                    {"tooltip": _image_tooltip(i + 1)},
                )
                for i in range(INPUTS)
            },
            "hidden": {"prompt": "PROMPT"},
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
        prompt: Any = None,
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
        refuse_what_cannot_run(prompt)
        names = [f"image{i + 1}" for i in range(INPUTS)]
        for name, image in images.items():
            if name not in names:
                raise InvalidRequest(
                    "There is no input {name} here: a model can be shown at most {most} images, as image1 to "
                    "image{most}.\n\nWhat to do: use fewer images.",
                    code="edit.no_such_input",
                    name=shown(name),
                    most=INPUTS,
                )
            if image is not None:
                check_image(name, image)
        given = [images[name] for name in names if images.get(name) is not None]
        edit = Edit(clip, vae, positive, negative, given, megapixels, _output(width, height), batch_size)
        member = VARIANTS[variant] or (clip.variant if isinstance(clip, LowVRAMCLIP) else None) or DEFAULT
        served = served_member(member)
        _require_own(served, member, edit)
        encoded = served.encode_edit(edit, member)
        return {"ui": {"text": [encoded.text]}, "result": (encoded.positive, encoded.negative, encoded.latent)}


def _require_own(served: ServedFamily, member: Enum, edit: Edit) -> None:
    """Raise WrongModel for a text encoder or a VAE of another family, before either runs."""
    family, clip = served.family, edit.clip
    if isinstance(clip, LowVRAMCLIP) and type(clip) is not served.clip:
        raise WrongModel(
            "clip is the text encoder of another model; {member} needs {needed}, such as {example}.\n\nWhat to do: "
            "set variant to auto, or connect the clip of a loader that has loaded {member}.",
            code="edit.other_clip",
            member=member.value,
            needed=family.text_encoder.value,
            example=family.text_encoder.example,
        )
    found = getattr(edit.vae, "latent_channels", family.latent_channels)
    if edit.images and found != family.latent_channels:
        raise WrongModel(
            "vae belongs to another model: it has {found} latent channels, but {member} needs {needed}.\n\nWhat to "
            "do: connect the vae of a loader that has loaded {member}, or load {example}.",
            code="edit.other_vae",
            member=member.value,
            found=found,
            needed=family.latent_channels,
            example=family.vae_example,
        )


def _image_tooltip(number: int) -> str:
    if number == 1:
        return "The image to edit; the output has its size."
    if number > MOST_IMAGES:
        return (
            f"For Qwen-Image-2.1: call it <image{number}> in the prompt. Inputs that are not connected are not counted."
        )
    called = f"Call it Picture {number} in the prompt, or <image{number}> for Qwen-Image-2.1."
    return f"{called} Inputs that are not connected are not counted."


def _output(width: int, height: int) -> tuple[int, int] | None:
    if bool(width) != bool(height):
        raise InvalidRequest(
            "The output is {width}x{height} px. Set both width and height, or leave both at 0 for the size of image 1.",
            code="edit.one_side_given",
            width=width,
            height=height,
        )
    return (width, height) if width else None
