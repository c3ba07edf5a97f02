"""Images of Qwen-Image-2.1 without ComfyUI are those of diffusers' pipeline. Collected where diffusers has it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.models.qwen_image_21.schedule import TURBO_SIGMAS
from qwenimage_lowvram.engine.runs.pipeline import Pipeline
from small_pipeline_21 import make_pipeline_21, open_with_diffusers, packed_noise, without_shift

PROMPT, NEGATIVE = 'a sign that says "红色"', "blurry"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, comfyui_path: Path) -> Path:
    return make_pipeline_21(tmp_path_factory.mktemp("pipeline"), comfyui=comfyui_path)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return open_with_diffusers(folder)


def reference(pipeline: Any, width: int, height: int, batch: int, cfg: float, **options: Any) -> torch.Tensor:
    """(batch, height, width, 4), of the same noise as ours."""
    images = pipeline(
        [PROMPT] * batch,
        negative_prompt=[NEGATIVE] * batch,
        true_cfg_scale=cfg,
        height=height,
        width=width,
        latents=packed_noise(width, height, batch, 5),
        output_type="pt",
        **options,
    ).images
    return images.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("width", "height", "batch", "cfg"), [(64, 96, 1, 1.0), (128, 64, 1, 4.0), (64, 64, 2, 3.0)], ids=str
)
def test_an_image_is_that_of_the_reference(
    folder: Path, theirs: Any, width: int, height: int, batch: int, cfg: float
) -> None:
    wanted = reference(theirs, width, height, batch, cfg, num_inference_steps=4)
    with Pipeline.open(folder, device="cpu") as pipeline:
        made = pipeline.make(PROMPT, NEGATIVE, width=width, height=height, seed=5, steps=4, cfg=cfg, batch=batch)
    assert made.shape == (batch, height, width, 4)
    assert wanted.std() > 0.05
    assert (made - wanted).abs().max() < 1e-4


def test_turbo_takes_its_own_sigmas(folder: Path, theirs: Any, tmp_path: Path, comfyui_path: Path) -> None:
    turbo = make_pipeline_21(tmp_path / "turbo", comfyui=comfyui_path, sample_sigmas=list(TURBO_SIGMAS))
    theirs.scheduler = without_shift(theirs.scheduler)
    wanted = reference(theirs, 64, 64, 1, 1.0, sigmas=list(TURBO_SIGMAS))
    with Pipeline.open(turbo, device="cpu") as pipeline:
        made = pipeline.make(PROMPT, width=64, height=64, seed=5, steps=8, cfg=1.0)
    assert (made - wanted).abs().max() < 1e-4
