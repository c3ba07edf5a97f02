"""The image that the engine makes by itself is that of the nodes, and ten lines of docs/ make one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from devtools.cache import REPOSITORY
from PIL import Image
from qwenimage_lowvram.engine.errors import InvalidRequest
from qwenimage_lowvram.engine.models.qwen_image.positions import Positions
from qwenimage_lowvram.engine.runs.pipeline import Pipeline

from .conftest import decode, sample

PROMPT, NEGATIVE = 'a sign that says "红色"', "blurry"


def of_nodes(
    folder: Path,
    width: int,
    height: int,
    batch: int,
    cfg: float,
    dtype: torch.dtype,
    image: torch.Tensor | None = None,
) -> Any:
    """(latents, images) of the nodes, on the files of `folder`; `image`: to change, of its own size."""
    from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
    from qwenimage_lowvram.engine.hardware import Hardware
    from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
    from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer
    from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
    from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP
    from qwenimage_lowvram.nodes.adapters.model import make_model
    from qwenimage_lowvram.nodes.adapters.vae import make_vae
    from qwenimage_lowvram.nodes.encode import QwenLowVRAMEncodePrompts
    from qwenimage_lowvram.nodes.encode_edit import QwenLowVRAMEncodeEditPrompt

    options = {"dtype": dtype, "hardware": Hardware.detect(torch.device("cpu"))}
    encoder = TextEncoder(open_checkpoint(folder / "text_encoder"), **options)
    clip = LowVRAMCLIP(encoder, PromptTokenizer(folder / "tokenizer"), None)
    transformer = open_checkpoint(folder / "transformer")
    model = make_model(QwenImageTransformer(transformer, positions=Positions.COMFYUI, **options), None)
    vae = make_vae(open_checkpoint(folder / "vae"), dtype=dtype, limit_bytes=None)
    if image is None:
        positive, negative = QwenLowVRAMEncodePrompts().encode(clip, PROMPT, NEGATIVE)
        empty = {"samples": torch.zeros(batch, 16, height // 8, width // 8)}
    else:
        encoded = QwenLowVRAMEncodeEditPrompt().encode(
            clip, vae, PROMPT, NEGATIVE, 0.0, width, height, batch, "auto", image1=image
        )
        positive, negative, empty = encoded["result"]
    settings = {"seed": 5, "steps": 4, "cfg": cfg, "latent_image": empty}
    latents = sample(model, positive=positive, negative=negative, **settings)["result"][0]
    return latents["samples"], decode(vae, latents)


# 112x80: an odd number of patches
@pytest.mark.parametrize(("width", "height", "batch"), [(112, 80, 1), (64, 96, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_guided_image_is_bit_for_bit_that_of_the_nodes(
    small_pipeline: Path, width: int, height: int, batch: int, dtype: torch.dtype
) -> None:
    latents, images = of_nodes(small_pipeline, width, height, batch, 4.0, dtype)
    pipeline = Pipeline.open(small_pipeline, device="cpu", dtype=dtype)
    prompts = pipeline.encode([PROMPT, NEGATIVE])
    ours = pipeline.sample(prompts, width=width, height=height, batch=batch, seed=5, steps=4)
    assert torch.equal(ours, latents)
    assert torch.equal(pipeline.decode(ours), images)


def test_an_edit_is_bit_for_bit_that_of_the_nodes(small_pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Qwen-Image-Edit-2511"
    shutil.copytree(small_pipeline, folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"zero_cond_t": True}))
    image = torch.rand(1, 90, 100, 3, generator=torch.Generator().manual_seed(1))
    latents, images = of_nodes(folder, 64, 48, 1, 4.0, torch.float32, image)
    pipeline = Pipeline.open(folder, device="cpu")
    ours = pipeline.make_latents(PROMPT, NEGATIVE, width=64, height=48, seed=5, steps=4, images=[image], megapixels=0.0)
    assert torch.equal(ours, latents)
    assert torch.equal(pipeline.decode(ours), images)
    plan = pipeline.report.sampling.plan
    assert plan.request.reference_tokens == 6 * 6  # 96x96 px, the nearest to its own size
    with pytest.raises(InvalidRequest, match=r"Qwen-Image-Edit-2511 changes images, but none was given"):
        pipeline.encode([PROMPT])


def test_without_guidance_it_differs_by_the_rounding_of_a_guidance_of_one(small_pipeline: Path) -> None:
    """ComfyUI computes positive = x + 1 * (positive - x) there, and rescales by a norm that is the same."""
    latents, _ = of_nodes(small_pipeline, 112, 80, 1, 1.0, torch.float32)
    pipeline = Pipeline.open(small_pipeline, device="cpu")
    ours = pipeline.sample(pipeline.encode([PROMPT]), width=112, height=80, seed=5, steps=4, cfg=1.0)
    assert (ours - latents).abs().max() < 1e-5


def test_the_ten_lines_of_the_docs_make_an_image(small_pipeline: Path, tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "developers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) <= 10
    shutil.copytree(small_pipeline, tmp_path / "models" / "Qwen-Image")
    (tmp_path / "image.py").write_text(code.replace("1328", "64").replace("steps=20", "steps=2"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "image.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Memory plan for 64x64, 2 branches" in done.stderr
    assert "sampling" in done.stdout
    assert Image.open(tmp_path / "cat.png").size == (64, 64)


def test_the_demo_compares_with_diffusers_and_with_the_engine_alone(small_pipeline: Path, tmp_path: Path) -> None:
    from devtools.reference import Inputs, difference, diffusers_image, engine_image

    inputs = Inputs(PROMPT, NEGATIVE, size=(112, 80), seed=5, steps=2, cfg=4.0)
    ours, file = engine_image(small_pipeline, inputs), tmp_path / "image.png"
    Image.fromarray((255.0 * ours).clip(0, 255).astype("uint8")).save(file)
    assert difference(file, ours) == 0
    assert difference(file, diffusers_image(small_pipeline, inputs)) <= 1
    assert difference(file, 1 - ours) > 100
