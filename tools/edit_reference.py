"""diffusers' editing pipeline on a pipeline folder, with pictures at their right positions. For tests."""

from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

# of a picture that neither the pipeline nor its processor resamples: 32 and 28 divide both sides, and the pipeline
# shows the vision tower 384x384 px in that shape
WIDTH, HEIGHT = 224, 672


class EditPlusPipeline(QwenImageEditPlusPipeline):
    """Tells the text encoder which tokens are pictures: diffusers' own (0.42) does not, and transformers 5 then gives
    them the positions of text."""

    def _get_qwen_prompt_embeds(
        self, prompt: Any = None, image: Any = None, device: Any = None, dtype: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shown = "".join(
            f"Picture {i + 1}: <|vision_start|><|image_pad|><|vision_end|>" for i in range(len(image or ()))
        )
        (text,) = [prompt] if isinstance(prompt, str) else prompt
        inputs = self.processor(
            text=[self.prompt_template_encode.format(shown + text)], images=image, return_tensors="pt"
        )
        if "mm_token_type_ids" not in inputs:
            raise RuntimeError("The processor does not say which tokens are pictures.")
        states = self.text_encoder.model(**inputs).last_hidden_state[:, self.prompt_template_encode_start_idx :]
        return states, torch.ones(states.shape[:2], dtype=torch.long)


def edit_plus_pipeline(folder: Path, *, zero_cond_t: bool = False) -> EditPlusPipeline:
    """Of the models of a text-to-image folder. Its references and pictures are WIDTH x HEIGHT px, either way round."""
    pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = WIDTH * HEIGHT
    models = QwenImagePipeline.from_pretrained(folder).components
    tokenizer = models["tokenizer"]
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(), tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor()
    )
    models["transformer"] = QwenImageTransformer2DModel.from_pretrained(
        folder / "transformer", zero_cond_t=zero_cond_t
    ).eval()
    pipeline = EditPlusPipeline(**models, processor=processor)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
