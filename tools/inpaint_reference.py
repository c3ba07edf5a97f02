"""diffusers' image-to-image and inpainting pipelines on a pipeline folder, their pictures encoded without chance. For
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
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

Kind = TypeVar("Kind")

# of a picture that neither the editing pipeline nor its processor resamples: 32 and 28 divide both sides, and no other
# such size in this shape is nearer to a megapixel
EDIT_SIZE = (672, 1568)


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
    """Tells the text encoder which tokens are pictures, as `edit_reference.EditPlusPipeline` does."""

    def _get_qwen_prompt_embeds(
        self, prompt: Any = None, image: Any = None, device: Any = None, dtype: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (text,) = [prompt] if isinstance(prompt, str) else prompt
        inputs = self.processor(text=[self.prompt_template_encode.format(text)], images=image, return_tensors="pt")
        if "mm_token_type_ids" not in inputs:
            raise RuntimeError("The processor does not say which tokens are pictures.")
        states = self.text_encoder.model(**inputs).last_hidden_state[:, self.prompt_template_encode_start_idx :]
        return states, torch.ones(states.shape[:2], dtype=torch.long)


def start_pipeline(kind: type[Kind], folder: Path) -> Kind:
    """An Img2ImgPipeline or InpaintPipeline of the models of a text-to-image folder."""
    pipeline: Any = kind(**QwenImagePipeline.from_pretrained(folder).components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit_inpaint_pipeline(folder: Path) -> EditInpaintPipeline:
    """Of the models of a text-to-image folder; for pictures of EDIT_SIZE."""
    models = QwenImagePipeline.from_pretrained(folder).components
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28}),
        tokenizer=models["tokenizer"],
        video_processor=Qwen2VLVideoProcessor(),
    )
    pipeline = EditInpaintPipeline(**models, processor=processor)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
