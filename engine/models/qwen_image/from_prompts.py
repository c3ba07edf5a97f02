"""Whole images of prompts, as Qwen-Image's reference pipelines make them (diffusers QwenImagePipeline, and
QwenImageEditPlusPipeline for those of images that are shown)."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...compute.link import TYPICAL_LINK
from ...errors import InvalidRequest
from ...planning.request import SamplingRequest
from ..qwen25_vl.vision_patches import patch_image, require_rgb
from ..qwen_image_vae.latent_statistics import normalised_latents, raw_latents
from ..qwen_vl.image_prompts import ImagePrompt
from ..shown_images import ShownImages
from .branch import Branch
from .edit_sizes import plan_sizes
from .latents import LATENT_PX, PATCH, pack, patches_of, shape_in_patches, unpack
from .positions import require_text_positions
from .prompt_template import EDIT_TEMPLATE
from .prompts import with_places
from .resample import resample
from .schedule import qwen_sigmas, true_cfg
from .transformer import QwenImageTransformer
from .variants import Variant

LATENT_CHANNELS = 16


class QwenImageFromPrompts:
    """As `family.FromPrompts`; latents are (B, 16, 1, h, w) in fp32."""

    side_px = PATCH * LATENT_PX

    def noise_shape(self, batch: int, width: int, height: int) -> tuple[int, ...]:
        return (batch, LATENT_CHANNELS, 1, height // LATENT_PX, width // LATENT_PX)

    def prompt_dim(self, transformer: QwenImageTransformer) -> int:
        return transformer.config.joint_attention_dim

    def require_noise(self, noise: Tensor) -> None:
        if noise.ndim != 5 or noise.shape[2] != 1 or 0 in noise.shape or noise.shape[-1] % 2 or noise.shape[-2] % 2:
            raise InvalidRequest(
                "The noise has the shape {shape}; (B, 16, 1, h, w) is needed, with even h and w: the image's sides "
                "must be multiples of 16 px.",
                code="run.wrong_noise",
                shape=list(noise.shape),
            )

    def show(self, images: Sequence[Tensor], member: Variant, size: tuple[int, int], megapixels: float) -> ShownImages:
        """A model of text to image takes them as Edit-2509 does."""
        member = member.when_shown_images
        for number, image in enumerate(images, start=1):
            require_rgb(image, f"Image {number}")
        given = [(image.shape[2], image.shape[1]) for image in images]
        planned = plan_sizes(given, member, megapixels=megapixels, output=size)
        each = list(zip(images, planned.images, strict=True))
        return ShownImages(
            tuple(patch_image(resample(image, *sizes.seen)) for image, sizes in each),
            member.labels_images,
            tuple(resample(image, *sizes.reference) for image, sizes in each),
        )

    def prompt(self, tokenizer: Any, text: str, shown: ShownImages) -> ImagePrompt:
        if not shown.in_prompts:
            return ImagePrompt(tuple(tokenizer.encode(text)))
        count = len(shown.in_prompts)
        text = with_places(text, count, labelled=shown.labelled)
        return ImagePrompt(tuple(tokenizer.encode(text, template=EDIT_TEMPLATE, images=count)), shown.in_prompts)

    def normalised(self, raw: Tensor) -> Tensor:
        return normalised_latents(raw)

    def request(
        self,
        transformer: QwenImageTransformer,
        prompts: Sequence[Tensor],
        noise: Tensor,
        steps: int,
        references: Sequence[Tensor] = (),
    ) -> SamplingRequest:
        shapes = [shape_in_patches(latent) for latent in (noise, *references)]
        for prompt in prompts:
            require_text_positions(shapes, prompt.shape[1], transformer.positions, layered=False)
        ranks = transformer.ranks
        return SamplingRequest(
            width=noise.shape[-1] * LATENT_PX,
            height=noise.shape[-2] * LATENT_PX,
            branches=len(prompts) * len(noise),
            prompt_tokens=max(prompt.shape[1] for prompt in prompts),
            reference_tokens=sum(prod(shape) for shape in shapes[1:]),
            timesteps=steps,
            ranks=1 if ranks is None else ranks.count,
            link=TYPICAL_LINK if ranks is None else ranks.link,
        )

    def sigmas(self, transformer: QwenImageTransformer, steps: int, noise: Tensor) -> Tensor:
        return qwen_sigmas(steps, prod(patches_of(noise)))

    def branch(self, latent: Tensor, prompt: Tensor, sigma: float, references: Sequence[Tensor] = ()) -> Branch:
        images = (latent, *references)
        tokens = torch.cat([pack(image) for image in images], dim=1)
        return Branch(tokens, tuple(shape_in_patches(image) for image in images), prompt, None, sigma)

    def velocity(self, answers: Sequence[Tensor], noise: Tensor) -> Tensor:
        return unpack(torch.cat(list(answers)).float(), *noise.shape[-2:])

    def guided(self, positive: Tensor, negative: Tensor, cfg: float) -> Tensor:
        return true_cfg(positive, negative, cfg, rescale=True)

    def raw(self, latents: Tensor) -> Tensor:
        return raw_latents(latents)
