"""Prompts with images to conditions and an empty latent: what the node for edits asks of a family; the 20B's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import node_helpers
import torch
from torch import Tensor

from ...engine.models.qwen25_vl.vision_patches import require_rgb
from ...engine.models.qwen_image.edit_sizes import plan_sizes
from ...engine.models.qwen_image.from_prompts import LATENT_CHANNELS
from ...engine.models.qwen_image.latents import LATENT_PX
from ...engine.models.qwen_image.prompt_template import EDIT_TEMPLATE
from ...engine.models.qwen_image.prompts import with_places
from ...engine.models.qwen_image.resample import resample
from ...engine.models.qwen_image.variants import Variant
from ...engine.runs.free_memory import check_room
from .clip import LowVRAMCLIP
from .graph_checks import NO_IMAGES_KEY

_SMALLER = "Use a smaller batch_size, or a smaller output."


@dataclass(frozen=True)
class Edit:
    """What a person asks for. images: (1, H, W, C) each. megapixels: of each image as the model is shown it, 0: its own
    size. output: (width, height) in px, None: as the first image."""

    clip: Any
    vae: Any
    positive: str
    negative: str
    images: Sequence[Tensor]
    megapixels: float
    output: tuple[int, int] | None
    batch_size: int

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each image."""
        return [(image.shape[2], image.shape[1]) for image in self.images]


@dataclass(frozen=True)
class EncodedEdit:
    """Two CONDITIONINGs and a LATENT; text: the sizes, for a person."""

    positive: Any
    negative: Any
    latent: dict[str, Any]
    text: str


def encode_edit(edit: Edit, member: Variant) -> EncodedEdit:
    """As Qwen-Image-Edit is shown images. Raises InvalidRequest. A model of text to image that is shown images takes
    them as Edit-2509 does."""
    member = member.when_shown_images
    for i, image in enumerate(edit.images, start=1):
        require_rgb(image, f"Image {i}")
    sizes = plan_sizes(edit.sizes, member, megapixels=edit.megapixels, output=edit.output)
    prompts = (edit.positive, edit.negative)
    texts = [with_places(text, len(edit.images), labelled=member.labels_images) for text in prompts]
    seen = [resample(image, *size.seen) for image, size in zip(edit.images, sizes.images, strict=True)]
    conditions = _encoded(edit.clip, texts, seen)
    values: dict[str, Any] = {NO_IMAGES_KEY: True}
    if edit.images:
        shown = zip(edit.images, sizes.images, strict=True)
        values = {"reference_latents": [edit.vae.encode(resample(image, *size.reference)) for image, size in shown]}
    positive, negative = (node_helpers.conditioning_set_values(each, values, append=True) for each in conditions)
    width, height = sizes.output
    shape = (edit.batch_size, LATENT_CHANNELS, 1, height // LATENT_PX, width // LATENT_PX)
    return EncodedEdit(positive, negative, empty_latent(shape, sizes.output, LATENT_PX), str(sizes))


def _encoded(clip: Any, texts: Sequence[str], seen: Sequence[Tensor]) -> list[Any]:
    if isinstance(clip, LowVRAMCLIP):
        return clip.encode_prompts(texts, template=EDIT_TEMPLATE, images=seen)
    tokens = [clip.tokenize(text, images=list(seen), llama_template=EDIT_TEMPLATE) for text in texts]
    return [clip.encode_from_tokens_scheduled(each) for each in tokens]


def empty_latent(shape: tuple[int, ...], size: tuple[int, int], latent_px: int) -> dict[str, Any]:
    """A LATENT of images of `size` (width, height) in px. Raises InvalidRequest where there is no room for it."""
    nbytes = 4 * torch.Size(shape).numel()
    check_room(nbytes, f"An empty latent of {shape[0]} images of {size[0]}x{size[1]} px", _SMALLER)
    samples = torch.zeros(shape, device=comfy.model_management.intermediate_device())
    return {"samples": samples, "downscale_ratio_spacial": latent_px}
