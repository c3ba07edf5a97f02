"""The Lightning graphs run as they are shipped, and our Load LoRA does what ComfyUI's does."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devtools.client import ComfyClient, PromptRefused
from PIL import Image

from .graphs import FOLDER, LIGHTNING, changed, with_inputs, workflow

PROMPTS = {"positive": "a red circle", "negative": " "}
SIZE = {"width": 112, "height": 80, "batch_size": 1}
LORA_NODE, SAMPLE_NODE = "8", "4"


@pytest.fixture(scope="module")
def loader(full_pipeline: Path) -> dict[str, Any]:
    return {"transformer": f"{full_pipeline.name} (folder)", "text_encoder": FOLDER, "vae": FOLDER, "dtype": "fp32"}


def prompt_of(path: Path, object_info: Any, loader: dict[str, Any]) -> dict[str, Any]:
    return workflow(path, object_info, loader, prompts=PROMPTS, size=SIZE, sample={"seed": 3})


def made_image(client: ComfyClient, prompt: dict[str, Any]) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    run = client.run(prompt)
    pixels = np.asarray(Image.open(io.BytesIO(client.image(run.images()[0]))).convert("RGB"), np.int16)
    return pixels, run.ui("qwen_lowvram_report")[0]


@pytest.mark.parametrize("path", LIGHTNING, ids=lambda path: path.stem)
def test_a_lightning_graph_takes_eight_steps_without_guidance(
    client: ComfyClient, object_info: Any, loader: dict[str, Any], lora: str, path: Path
) -> None:
    shown, report = made_image(client, prompt_of(path, object_info, loader))
    assert report["steps"] == report["passes"] == 8
    assert report["plan"]["request"]["branches"] == 1
    assert shown.std() > 5


def test_our_lora_and_comfyuis_make_one_image(
    client: ComfyClient, object_info: Any, loader: dict[str, Any], lora: str
) -> None:
    ours = prompt_of(LIGHTNING[0], object_info, loader)
    shown, _ = made_image(client, ours)
    native = changed(
        ours,
        LORA_NODE,
        n20=("LoraLoaderModelOnly", {"model": ["1", 0], "lora_name": lora, "strength_model": 1.0}),
    )
    theirs, _ = made_image(client, with_inputs(native, SAMPLE_NODE, model=["20", 0]))
    assert np.array_equal(shown, theirs)
    plain, _ = made_image(client, with_inputs(changed(ours, LORA_NODE), SAMPLE_NODE, model=["1", 0]))
    assert np.abs(shown - plain).max() > 5
    off, _ = made_image(client, with_inputs(ours, LORA_NODE, strength=0.0))
    assert np.array_equal(off, plain)


@pytest.mark.parametrize("name", ["../secret.safetensors", "missing.safetensors"])
def test_a_lora_that_is_not_there_is_refused(
    client: ComfyClient, object_info: Any, loader: dict[str, Any], lora: str, name: str
) -> None:
    prompt = with_inputs(prompt_of(LIGHTNING[0], object_info, loader), LORA_NODE, lora_name=name)
    with pytest.raises(PromptRefused):
        client.run(prompt)
