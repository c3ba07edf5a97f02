"""Qwen-Image-2.1's text encoder as ComfyUI's CLIP, and its prompts with images."""

from collections.abc import Sequence
from typing import Any

import node_helpers
import torch
from torch import Tensor

from ...engine.errors import InvalidRequest
from ...engine.models.qwen3_vl.prompt_template import PROMPT_TEMPLATE
from ...engine.models.qwen3_vl.vision_patches import LEAST_PIXELS, patch_image, require_image, resize_image
from ...engine.models.qwen_image_21.latents import CHANNELS, TOKEN_PX
from ...engine.models.qwen_image_21.sizes import HALOED, PIXELS, WARNED_IMAGES, plan_sizes_21
from ...engine.models.qwen_image_21.variants import Variant21
from ...engine.models.qwen_vl.image_prompts import ImagePrompt
from ...engine.models.qwen_vl.images import PatchedImage
from ...engine.told import Told
from .clip import LowVRAMCLIP, as_comfyui_reads
from .edit_prompts import Edit, EncodedEdit, empty_latent
from .graph_checks import refuse
from .graph_checks_21 import SLOTS_KEY
from .progress import warn
from .value_checks import check_image

KEEP_KEY = "keep_vision"  # of an image among tokens: its states stay in the conditioning


class LowVRAMCLIP21(LowVRAMCLIP):
    """As LowVRAMCLIP. A conditioning holds the states of a prompt's text; where its images stood, `image_slots` says,
    for their latents (`reference_latents`), which whoever has the VAE adds."""

    tokens_key = "qwen3vl_8b"
    template = PROMPT_TEMPLATE

    def tokenize(
        self,
        text: str,
        return_word_ids: bool = False,
        *,
        llama_template: str | None = None,
        images: Sequence[Tensor] | None = None,
        keep_vision: bool = False,
        prevent_empty_text: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As LowVRAMCLIP. `keep_vision`: the images' states stay, where no VAE gives their latents. An empty prompt is
        always one blank, as the model was trained."""
        if not prevent_empty_text and not text:
            refuse(
                "A prompt without any text (prevent_empty_text off)",
                "enter a space.",
                code="clip_21.empty_text",
            )
        entries = [{"type": "image", "data": image, KEEP_KEY: keep_vision} for image in images or ()]
        template = llama_template or self.template
        tokens = self.tokenizer.encode(as_comfyui_reads(text), template=template, images=len(entries))
        return self._as_tokens(tokens, entries)

    def _conditioned(
        self, prompt: ImagePrompt, cond: Tensor, pairs: Sequence[tuple[Any, ...]] = ()
    ) -> tuple[Tensor, dict[str, Any]]:
        kept = [element.get(KEEP_KEY, False) for element, *_ in pairs if isinstance(element, dict)]
        if not prompt.images or any(kept):
            return cond, {}
        start = prompt.place(self.tokenizer.start(prompt.tokens))
        texts, slots, at = [], [], 0
        for begin, end in prompt.image_spans:
            texts.append(cond[:, at : begin - start])
            slots.append(sum(text.shape[1] for text in texts))
            at = end - start
        return torch.cat([*texts, cond[:, at:]], dim=1), {SLOTS_KEY: slots}

    def _patched(self, image: Any) -> PatchedImage:
        check_image("An image in a prompt", image)
        return patch_image(image)


def encode_edit_21(edit: Edit, member: Variant21) -> EncodedEdit:
    """As Qwen-Image-2.1 is shown images: each scaled to one area, the same for encoder and VAE, alpha included; or each
    in its own size, of which the encoder sees one below LEAST_PIXELS enlarged. Raises InvalidRequest."""
    for i, image in enumerate(edit.images, start=1):
        require_image(image, f"Image {i}")
    sizes = plan_sizes_21(edit.sizes, pixels=edit.megapixels * PIXELS or None, output=edit.output)
    for number, (wide, high) in enumerate(sizes.references, start=1):
        if edit.megapixels and wide * high < LEAST_PIXELS:
            raise InvalidRequest(
                "Image {number} would be shown to Qwen-Image-2.1 at {width}x{height} px; all images are scaled to the "
                "same area, which must be at least {least} pixels.\n\nWhat to do: set megapixels to 1, which it was "
                "trained for, to at least 0.1, or to 0 for each image's own size.",
                code="edit_21.too_small_area",
                number=number,
                width=wide,
                height=high,
                least=LEAST_PIXELS,
            )
    _tell_doubts(len(edit.images), sizes.one_grid)
    shown = [resize_image(image, *size) for image, size in zip(edit.images, sizes.references, strict=True)]
    conditions = _encoded(edit.clip, (edit.positive, edit.negative), shown)
    if shown:
        values = {"reference_latents": [edit.vae.encode(image) for image in shown]}
        conditions = [node_helpers.conditioning_set_values(each, values, append=True) for each in conditions]
    positive, negative = conditions
    width, height = sizes.output
    shape = (edit.batch_size, CHANNELS, height // TOKEN_PX, width // TOKEN_PX)
    text = f"output {width}x{height}"
    if sizes.references:
        text += ", images " + ", ".join(f"{wide}x{high}" for wide, high in sizes.references)
    if sizes.aside:
        text += f"\nnot {HALOED[0]}x{HALOED[1]}, where edits come out as near-copies of the image"
    return EncodedEdit(positive, negative, empty_latent(shape, sizes.output, TOKEN_PX), text)


def _tell_doubts(images: int, one_grid: bool) -> None:
    if images > WARNED_IMAGES:
        told = Told(
            "{images} images: Qwen-Image-2.1 was made for at most {most}.",
            code="told.many_images",
            images=images,
            most=WARNED_IMAGES,
        )
        warn(told)
    if not one_grid:
        told = Told(
            "The output does not have the size of the first image: what is kept of it is moved or scaled.",
            code="told.other_grid",
        )
        warn(told)


def _encoded(clip: Any, texts: Sequence[str], images: Sequence[Tensor]) -> list[Any]:
    if isinstance(clip, LowVRAMCLIP21):
        return clip.encode_prompts(texts, images=images)
    return [clip.encode_from_tokens_scheduled(clip.tokenize(text, images=list(images))) for text in texts]
