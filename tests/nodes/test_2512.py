"""Qwen-Image-2512 has Qwen-Image's tensors: its published files are read as that, with its schedules and LoRAs."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.models.qwen_image.schedule import lightning_sigmas, qwen_sigmas
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant
from safetensors.torch import save_file
from small_checkpoint import write_split_files

from .conftest import cond, empty_latent

# published name -> how it is stored
FILES = {
    "qwen_image_2512_bf16.safetensors": "bf16",
    "qwen_image_2512_fp8_e4m3fn.safetensors": "fp8",
    "qwen-image-2512-Q4_0.gguf": "gguf_q4_0",
    "Qwen-Image-2512-Q8_0.gguf": "gguf_q8_0",
}
LORA = "Qwen-Image-2512-Lightning-4steps-V1.0-bf16.safetensors"
Load = Callable[[str], Any]


@pytest.fixture
def load(models: Any, full_pipeline: Path, tmp_path: Path) -> Load:
    """`load(name)` -> the MODEL that the loader makes of that file, or of that folder."""
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    def make(name: str) -> Any:
        folder = tmp_path / "models"
        written = write_split_files(full_pipeline, folder, dtype=FILES.get(name, "bf16"))
        (folder / "diffusion_models" / written.transformer).rename(folder / "diffusion_models" / name)
        shutil.copytree(full_pipeline, folder / "diffusers" / "Qwen-Image-2512")
        for kind in ("diffusion_models", "text_encoders", "vae", "diffusers"):
            models(kind, str(folder / kind))
        chosen = (name, written.text_encoder, written.vae) if name in FILES else (name, *["from the folder"] * 2)
        assert asyncio.run(QwenLowVRAMLoader.VALIDATE_INPUTS(chosen[0])) is True
        return QwenLowVRAMLoader().load(*chosen, "fp32", "as stored", 0.0, "fp32")[0]

    return make


def sample(model: Any, **settings: Any) -> Any:
    """The node as a new one on the page has it, but for `settings`; returns the run's report."""
    from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

    inputs = QwenLowVRAMSample.INPUT_TYPES()["required"]
    set_ = {name: spec[1]["default"] for name, spec in inputs.items() if "default" in (spec[1:] or ({},))[0]}
    QwenLowVRAMSample().sample(model, cond(), cond(5, 2), empty_latent(), **{**set_, **settings})
    return model.model.last_report


@pytest.mark.parametrize("name", [*FILES, "Qwen-Image-2512 (folder)"])
def test_2512_is_sampled_as_qwen_image(name: str, load: Load) -> None:
    model = load(name)
    transformer = model.model.transformer
    assert transformer.variant is Variant.QWEN_IMAGE
    report = sample(model, steps=3)
    assert (report.steps, report.plan.request.branches) == (3, 2)
    assert transformer.modulation.knows(model.model.model_sampling.timestep(qwen_sigmas(3, 24)[:-1]).tolist())
    lightning = sample(model, preset="Lightning, 4 steps")
    assert (lightning.steps, lightning.plan.request.branches) == (4, 1)
    assert transformer.modulation.knows(model.model.model_sampling.timestep(lightning_sigmas(4)[:-1]).tolist())


@pytest.mark.parametrize(("name", "warned"), [("qwen_image_2512_bf16.safetensors", False), (list(FILES)[1], True)])
def test_its_lightning_lora_is_known_by_its_name(
    name: str,
    warned: bool,
    load: Load,
    models: Any,
    tmp_path: Path,
) -> None:
    from qwenimage_lowvram.nodes.lora import QwenLowVRAMLoadLora

    model = load(name)
    tensors = {}
    for weight, (rows, columns) in (
        (weight, shape) for weight, shape in model.model.transformer.weights.items() if ".attn.to_q.weight" in weight
    ):
        layer = weight.removesuffix(".weight")
        tensors[f"{layer}.lora_up.weight"] = torch.randn(rows, 2)
        tensors[f"{layer}.lora_down.weight"] = torch.randn(2, columns)
        tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    (tmp_path / "models" / "loras").mkdir()
    save_file(tensors, tmp_path / "models" / "loras" / LORA)
    models("loras", str(tmp_path / "models" / "loras"))
    _, text = QwenLowVRAMLoadLora().load(model, LORA, 1.0)["result"]
    assert ("known to draw a grid" in text) == warned
