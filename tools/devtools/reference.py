"""diffusers' own pipeline on the inputs of a finished run: what our picture is compared with."""

from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import QwenImagePipeline
from PIL import Image


def quiet_libraries() -> None:
    """No progress bars and no warnings of diffusers and transformers: the demo's words stay readable."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def difference_from_diffusers(
    folder: Path,
    picture: Path,
    *,
    prompt: str,
    negative_prompt: str,
    size: tuple[int, int],
    seed: int,
    steps: int,
    cfg: float,
    device: str = "cpu",
) -> int:
    """The largest difference of any value of the 8-bit picture from diffusers' fp32 one, in 1/255."""
    quiet_libraries()
    pipeline = QwenImagePipeline.from_pretrained(folder).to(device, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt,
        negative_prompt=negative_prompt,
        true_cfg_scale=cfg,
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        max_sequence_length=1024,
        output_type="np",
    ).images[0]
    # ComfyUI's SaveImage cuts off, where diffusers rounds
    expected = (255.0 * expected).clip(0, 255).astype(np.uint8).astype(int)
    return int(np.abs(np.asarray(Image.open(picture).convert("RGB")).astype(int) - expected).max())
