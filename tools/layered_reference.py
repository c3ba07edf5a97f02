"""diffusers' pipeline of Qwen-Image-Layered on a small folder, for images of a few patches. For tests."""

from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageLayeredPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from PIL import Image
from torch import Tensor

# of the image that is taken apart; the pipeline itself knows areas of 640x640 and 1024x1024 px alone
WIDTH, HEIGHT = 160, 96


def layered_reference(
    folder: Path, image: Image.Image, noise: Tensor, *, prompt: str, negative: str, cfg: float, steps: int
) -> tuple[Tensor, Tensor]:
    """What the pipeline makes of an image of WIDTH x HEIGHT px and of noise (1, 16, F, h, w): latents like it, still
    normalised, and the layers (F - 1, H, W, 4) in 0..1, without the first frame, which is the image itself."""
    pipeline_qwenimage_layered.calculate_dimensions = lambda area, ratio: (WIDTH, HEIGHT)
    pipeline = QwenImageLayeredPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    batch, channels, frames, height, width = noise.shape
    as_it_has_them = noise.permute(0, 2, 1, 3, 4).contiguous()
    seen: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(values["latents"])
        return {}

    # output_type "latent" raises UnboundLocalError in diffusers 0.42
    made = pipeline(
        image=image.convert("RGBA"),
        prompt=prompt,
        negative_prompt=negative,
        true_cfg_scale=cfg,
        layers=frames - 1,
        num_inference_steps=steps,
        latents=pipeline._pack_latents(as_it_has_them, batch, channels, height, width, frames),
        cfg_normalize=True,
        callback_on_step_end=keep,
        output_type="pt",
    ).images[0]
    latents = pipeline._unpack_latents(seen[-1], HEIGHT, WIDTH, frames - 1, 8)
    return torch.as_tensor(latents), torch.as_tensor(made).permute(0, 2, 3, 1)
