"""The memory nodes through the real server: a plan before anything runs, and a report after everything has."""

import io
import json
from typing import Any

import pytest
from devtools.client import ComfyClient, ExecutionFailed, Run
from PIL import Image
from small_checkpoint import SplitFiles

from .graphs import FOLDER, WORKFLOWS, changed, with_inputs, workflow

SIZE = {"width": 112, "height": 80, "batch_size": 1}
STAGES = ["encode", "load", "modulation", "sampling", "decode"]


def made_image(client: ComfyClient, run: Run, node: str) -> Image.Image:
    (image,) = run.outputs[node]["images"]
    assert image["type"] == "temp"
    return Image.open(io.BytesIO(client.image(image)))


def test_the_plan_is_shown_without_loading_anything(client: ComfyClient, split_files: dict[str, SplitFiles]) -> None:
    names = split_files["bf16"]
    inputs = {
        "transformer": names.transformer,
        "text_encoder": names.text_encoder,
        "vae": names.vae,
        "weight_format": "as stored",
        "width": 1024,
        "height": 1024,
        "batch_size": 1,
        "steps": 20,
        "cfg": 4.0,
        "prompt_tokens": 60,
        "vram_limit_gb": 2.5,
        "ram_limit_gb": 16.0,
    }
    prompt = {"1": {"class_type": "QwenLowVRAMMemoryPlan", "inputs": inputs}}
    run = client.run(prompt)
    (text,) = run.ui("text")
    assert text.startswith("Memory plan: 1024x1024, batch 1, guided, 20 steps\n" + names.transformer)
    assert "limit 2.5 GB" in text
    assert made_image(client, run, "1").width == 1200
    assert client.run(prompt).executed() == set()  # nothing has changed
    assert client.run(with_inputs(prompt, "1", width=512)).executed() == {"1"}


@pytest.fixture
def prompt(object_info: dict[str, Any], full_pipeline: Any) -> dict[str, Any]:
    """A bundled graph with a report that waits for the image, and what shows the report's JSON."""
    graph = workflow(
        WORKFLOWS[0],
        object_info,
        {
            "transformer": f"{full_pipeline.name} (folder)",
            "text_encoder": FOLDER,
            "vae": FOLDER,
            "dtype": "fp32",
            "vram_limit_gb": 2.0,
        },
        prompts={"positive": "a red circle by the sea", "negative": "memory report"},
        size=SIZE,
        sample={"seed": 3, "steps": 4},
    )
    return changed(
        graph,
        n7=("QwenLowVRAMMemoryReport", {"model": ["1", 0], "after": ["5", 0]}),
        n8=("PreviewAny", {"source": ["7", 2]}),
    )


def test_the_report_tells_what_each_stage_took(client: ComfyClient, prompt: dict[str, Any]) -> None:
    run = client.run(prompt)
    (text,) = run.outputs["7"]["text"]
    (shown,) = run.outputs["8"]["text"]
    values = json.loads(shown)
    assert values["text"] == text
    assert [stage["stage"] for stage in values["stages"]] == STAGES
    for stage in values["stages"]:
        assert stage["ram_bytes"] > 0
        assert stage["seconds"] > 0
        assert 0 < stage["plan"]["peak_bytes"] <= 2 * 1024**3
    (sampled,) = run.ui("qwen_lowvram_report")
    assert values["sampling"] == sampled
    assert sampled["text"] in text
    assert made_image(client, run, "7").width == 1200

    again = client.run(with_inputs(prompt, "4", seed=4))
    assert {"4", "5", "7"} <= again.executed()
    values = json.loads(again.outputs["8"]["text"][0])
    assert [stage["stage"] for stage in values["stages"]] == ["load", "sampling", "decode"]
    assert "encode, modulation" in again.outputs["7"]["text"][0]


def test_a_report_that_nothing_came_before_says_what_to_do(client: ComfyClient, prompt: dict[str, Any]) -> None:
    alone = {"1": with_inputs(prompt, "1", vram_limit_gb=1.9)["1"], "7": prompt["7"]}
    alone["7"] = {**alone["7"], "inputs": {"model": ["1", 0]}}
    with pytest.raises(ExecutionFailed, match="No stage of this model has run yet"):
        client.run(alone)
