"""What an image of the server is compared with: diffusers' own pipeline, and our engine without ComfyUI, in fp32."""

from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import QwenImagePipeline
from PIL import Image
from qwenimage_lowvram.engine.models.qwen_image.positions import Positions
from qwenimage_lowvram.engine.runs.pipeline import Pipeline


@dataclass(frozen=True)
class Inputs:
    """Of a finished run. size: width and height in px."""

    prompt: str
    negative_prompt: str
    size: tuple[int, int]
    seed: int
    steps: int
    cfg: float


def quiet_libraries() -> None:
    """No progress bars and no warnings of diffusers and transformers: the demo's words stay readable."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def diffusers_image(folder: Path, inputs: Inputs, device: str = "cpu") -> np.ndarray:
    """(H, W, 3) in 0 to 1, by the pipeline of `folder`."""
    quiet_libraries()
    pipeline = QwenImagePipeline.from_pretrained(folder).to(device, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image: np.ndarray = pipeline(
        inputs.prompt,
        negative_prompt=inputs.negative_prompt,
        true_cfg_scale=inputs.cfg,
        width=inputs.size[0],
        height=inputs.size[1],
        num_inference_steps=inputs.steps,
        generator=torch.Generator().manual_seed(inputs.seed),
        max_sequence_length=1024,
        output_type="np",
    ).images[0]
    return image


def engine_image(folder: Path, inputs: Inputs, device: str = "cpu") -> np.ndarray:
    """The same of our engine alone."""
    settings = {"device": device, "dtype": torch.float32, "positions": Positions.DIFFUSERS}
    with Pipeline.open(folder, **settings) as pipeline:
        images = pipeline.make(
            inputs.prompt,
            inputs.negative_prompt,
            width=inputs.size[0],
            height=inputs.size[1],
            seed=inputs.seed,
            steps=inputs.steps,
            cfg=inputs.cfg,
        )
    return images[0].numpy()


def difference(image: Path, expected: np.ndarray) -> int:
    """The largest difference of any value of an image file from `expected`, in 1/255."""
    # ComfyUI's SaveImage cuts off, where diffusers rounds
    eight_bit = (255.0 * expected).clip(0, 255).astype(np.uint8).astype(int)
    return int(np.abs(np.asarray(Image.open(image).convert("RGB")).astype(int) - eight_bit).max())
