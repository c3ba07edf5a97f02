"""The Lightning graphs run as they are shipped, and our Load LoRA does what ComfyUI's does."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devtools.client import ComfyClient, PromptRefused
from PIL import Image
from safetensors.torch import load_file, save_file

from .graphs import FOLDER, LIGHTNING, changed, with_inputs, workflow

PROMPTS = {"positive": "a red circle", "negative": " "}
SIZE = {"width": 112, "height": 80, "batch_size": 1}
LORA_NODE, SAMPLE_NODE = "8", "4"


@pytest.fixture(scope="module")
def loader(full_pipeline: Path) -> dict[str, Any]:
    return {"transformer": f"{full_pipeline.name} (folder)", "text_encoder": FOLDER, "vae": FOLDER, "dtype": "fp32"}


@pytest.fixture(scope="module")
def lora(full_pipeline: Path, models_dir: Path) -> str:
    """A LoRA for the small checkpoint, under the name that the graphs ask for."""
    (name,) = {
        node["widgets_values"][0]
        for path in LIGHTNING
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]
        if node["type"] == "QwenLowVRAMLoadLora"
    }
    weights = load_file(next((full_pipeline / "transformer").glob("*.safetensors")))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, weight in weights.items():
        if key.endswith(("attn.to_q.weight", "img_mlp.net.2.weight")):
            layer = f"diffusion_model.{key.removesuffix('.weight')}"
            tensors[f"{layer}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=generator)
            tensors[f"{layer}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=generator) / 8
    (models_dir / "loras").mkdir(exist_ok=True)
    save_file(tensors, models_dir / "loras" / name)
    return name


def prompt_of(path: Path, object_info: Any, loader: dict[str, Any]) -> dict[str, Any]:
    return workflow(path, object_info, loader, prompts=PROMPTS, size=SIZE, sample={"seed": 3})


def picture(client: ComfyClient, prompt: dict[str, Any]) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    run = client.run(prompt)
    pixels = np.asarray(Image.open(io.BytesIO(client.image(run.images()[0]))).convert("RGB"), np.int16)
    return pixels, run.ui("qwen_lowvram_report")[0]


@pytest.mark.parametrize("path", LIGHTNING, ids=lambda path: path.stem)
def test_a_lightning_graph_takes_eight_steps_without_guidance(
    client: ComfyClient, object_info: Any, loader: dict[str, Any], lora: str, path: Path
) -> None:
    shown, report = picture(client, prompt_of(path, object_info, loader))
    assert report["steps"] == report["passes"] == 8
    assert report["plan"]["request"]["branches"] == 1
    assert shown.std() > 5


def test_our_lora_and_comfyuis_make_one_picture(
    client: ComfyClient, object_info: Any, loader: dict[str, Any], lora: str
) -> None:
    ours = prompt_of(LIGHTNING[0], object_info, loader)
    shown, _ = picture(client, ours)
    native = changed(
        ours,
        LORA_NODE,
        n20=("LoraLoaderModelOnly", {"model": ["1", 0], "lora_name": lora, "strength_model": 1.0}),
    )
    theirs, _ = picture(client, with_inputs(native, SAMPLE_NODE, model=["20", 0]))
    assert np.array_equal(shown, theirs)
    plain, _ = picture(client, with_inputs(changed(ours, LORA_NODE), SAMPLE_NODE, model=["1", 0]))
    assert np.abs(shown - plain).max() > 5
    off, _ = picture(client, with_inputs(ours, LORA_NODE, strength=0.0))
    assert np.array_equal(off, plain)


@pytest.mark.parametrize("name", ["../secret.safetensors", "missing.safetensors"])
def test_a_lora_that_is_not_there_is_refused(
    client: ComfyClient, object_info: Any, loader: dict[str, Any], lora: str, name: str
) -> None:
    prompt = with_inputs(prompt_of(LIGHTNING[0], object_info, loader), LORA_NODE, lora_name=name)
    with pytest.raises(PromptRefused):
        client.run(prompt)
