"""diffusers' image-to-image and inpainting pipelines on a pipeline folder, their images encoded without chance. For
tests."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    QwenImageEditInpaintPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
)
from edit_reference import Embeds, edit_models, embeds_of

Kind = TypeVar("Kind")


class _Encoding:
    """The mean of what the VAE sees, as ComfyUI takes it: diffusers draws from the distribution, before the noise."""

    vae: Any

    def _encode_vae_image(self, image: torch.Tensor, generator: Any) -> torch.Tensor:
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return (self.vae.encode(image).latent_dist.mode() - mean) / std


class Img2ImgPipeline(_Encoding, QwenImageImg2ImgPipeline):
    pass


class InpaintPipeline(_Encoding, QwenImageInpaintPipeline):
    pass


class EditInpaintPipeline(_Encoding, QwenImageEditInpaintPipeline):
    """Tells the text encoder which tokens are images, as `edit_reference.EditPipeline` does."""

    def _get_qwen_prompt_embeds(self, prompt: Any = None, image: Any = None, *_: Any) -> Embeds:
        (text,) = [prompt] if isinstance(prompt, str) else prompt
        return embeds_of(self, text, image)


def start_pipeline(kind: type[Kind], folder: Path) -> Kind:
    """An Img2ImgPipeline or InpaintPipeline of the models of a text-to-image folder."""
    pipeline: Any = kind(**QwenImagePipeline.from_pretrained(folder).components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit_inpaint_pipeline(folder: Path) -> EditInpaintPipeline:
    """Of the models of a text-to-image folder; for images of FIRST_WIDTH x FIRST_HEIGHT px."""
    pipeline = EditInpaintPipeline(**edit_models(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
