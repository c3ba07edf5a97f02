"""diffusers' editing pipelines on a pipeline folder, with images at their right positions. For tests."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

# of an image that neither the pipeline nor its processor resamples: 32 and 28 divide both sides, and the pipeline
# shows the vision tower 384x384 px in that shape
WIDTH, HEIGHT = 224, 672
# the same for the first Edit, which shows the tower and the transformer 1024x1024 px
FIRST_WIDTH, FIRST_HEIGHT = 672, 1568
# of an image that the published processor lets the tower see; the class alone has less
MOST_SEEN_PIXELS = 12845056

Embeds = tuple[torch.Tensor, torch.Tensor]


class EditPlusPipeline(QwenImageEditPlusPipeline):
    """Tells the text encoder which tokens are images: diffusers' own (0.42) does not, and transformers 5 then gives
    them the positions of text."""

    def _get_qwen_prompt_embeds(self, prompt: Any, image: Any = None, *_: Any) -> Embeds:
        shown = "".join(
            f"Picture {i + 1}: <|vision_start|><|image_pad|><|vision_end|>" for i in range(len(image or ()))
        )
        (text,) = [prompt] if isinstance(prompt, str) else prompt
        return embeds_of(self, shown + text, image)


class EditPipeline(QwenImageEditPipeline):
    """The first Edit's, corrected in the same way. Its template has the image's place."""

    def _get_qwen_prompt_embeds(self, prompt: Any, image: Any = None, *_: Any) -> Embeds:
        (text,) = [prompt] if isinstance(prompt, str) else prompt
        return embeds_of(self, text, [image])


def edit_plus_pipeline(folder: Path, *, zero_cond_t: bool = False) -> EditPlusPipeline:
    """Of the models of a text-to-image folder. Its references and images are WIDTH x HEIGHT px, either way round."""
    pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = WIDTH * HEIGHT
    models = edit_models(folder)
    models["transformer"] = QwenImageTransformer2DModel.from_pretrained(
        folder / "transformer", zero_cond_t=zero_cond_t
    ).eval()
    pipeline = EditPlusPipeline(**models)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit_pipeline(folder: Path) -> EditPipeline:
    """Of the models of a text-to-image folder. Its image is FIRST_WIDTH x FIRST_HEIGHT px."""
    pipeline = EditPipeline(**edit_models(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_edit_folder(folder: Path, pixels: int, *, dtype: torch.dtype = torch.float32) -> EditPlusPipeline:
    """Of an Edit-2509 pipeline folder. Its references are `pixels` large."""
    pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = pixels
    pipeline = EditPlusPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit_models(folder: Path) -> dict[str, Any]:
    models: dict[str, Any] = QwenImagePipeline.from_pretrained(folder).components
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=MOST_SEEN_PIXELS),
        tokenizer=models["tokenizer"],
        video_processor=Qwen2VLVideoProcessor(),
    )
    return models | {"processor": processor}


def embeds_of(pipeline: Any, text: str, images: Any) -> Embeds:
    inputs = pipeline.processor(text=[pipeline.prompt_template_encode.format(text)], images=images, return_tensors="pt")
    if "mm_token_type_ids" not in inputs:
        raise RuntimeError("The processor does not say which tokens are images.")
    states = pipeline.text_encoder.model(**inputs).last_hidden_state[:, pipeline.prompt_template_encode_start_idx :]
    return states, torch.ones(states.shape[:2], dtype=torch.long)
