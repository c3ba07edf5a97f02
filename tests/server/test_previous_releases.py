"""Graphs that people have saved with earlier releases load and run: those that the releases brought, kept as data, and
what a program sends, with every input by its name."""

import json
from pathlib import Path
from typing import Any

import pytest
from devtools.client import ComfyClient
from devtools.workflow import set_widgets, to_prompt
from PIL import Image

from .graphs import FOLDER

GRAPHS = Path(__file__).parents[1] / "data" / "graphs"
PAGE_GRAPHS = [path for path in sorted(GRAPHS.glob("*/*.json")) if path.stem != "prompt"]
PROMPTS = sorted(GRAPHS.glob("*/prompt.json"))
# what takes long at full size, and what needs files that are not here
SMALL: dict[str, dict[str, Any]] = {
    "QwenLowVRAMLoader": {"text_encoder": FOLDER, "vae": FOLDER, "weight_format": "as stored"},
    "QwenLowVRAMSample": {"steps": 2, "seed": 5},
    "QwenLowVRAMEncodeEditPrompt": {"megapixels": 0.02, "variant": "Qwen-Image-Edit-2509"},
    "LoadImage": {"image": "painted.png"},
    "EmptySD3LatentImage": {"width": 112, "height": 80},
    "ImageScaleToTotalPixels": {"megapixels": 0.02},
    "ImagePadForOutpaint": {"left": 0, "right": 64, "feathering": 4},
}


@pytest.fixture(scope="module")
def folders(full_pipeline: Path, layered_folder: str, lora: str) -> dict[bool, str]:
    """Small models, by whether they make layers."""
    return {False: f"{full_pipeline.name} (folder)", True: layered_folder}


@pytest.fixture(scope="module", autouse=True)
def _painted(server_base: Path) -> None:
    """An image with a mask, as the mask editor saves it."""
    image = Image.linear_gradient("L").resize((160, 112)).convert("RGBA")
    image.paste((0, 0, 0, 0), (40, 24, 100, 80))
    image.save(server_base / "input" / "painted.png")


@pytest.mark.parametrize("path", PAGE_GRAPHS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_graph_of_an_earlier_release_runs(
    path: Path, client: ComfyClient, object_info: dict[str, Any], folders: dict[bool, str]
) -> None:
    graph = json.loads(path.read_text(encoding="utf-8"))
    kinds = {node["type"] for node in graph["nodes"]}
    layered = "EmptyQwenImageLayeredLatentImage" in kinds
    for kind, values in SMALL.items():
        if kind in kinds:
            graph = set_widgets(graph, object_info, kind, **values)
    graph = set_widgets(graph, object_info, "QwenLowVRAMLoader", transformer=folders[layered])
    run = client.run(to_prompt(graph, object_info))
    assert len(run.images()) == (5 if layered else 1)
    assert run.ui("qwen_lowvram_report")[0]["passes"] >= 2


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.parent.name)
def test_what_a_program_sent_to_an_earlier_release_runs(
    path: Path, client: ComfyClient, object_info: dict[str, Any], folders: dict[bool, str]
) -> None:
    prompt = json.loads(path.read_text(encoding="utf-8"))
    for node in prompt.values():
        known = object_info[node["class_type"]]["input"]
        assert node["inputs"].keys() <= {name for group in known.values() for name in group}
        node["inputs"] |= SMALL.get(node["class_type"], {})
        if "transformer" in node["inputs"]:
            node["inputs"] |= {"transformer": folders[False], "text_encoder": FOLDER, "vae": FOLDER}
    run = client.run(prompt)
    assert len(run.outputs["5"]["images"]) == 1
    assert run.outputs["9"]["text"]
    assert "1 to change" in run.outputs["8"]["text"][0]
    assert "sampling" in run.outputs["6"]["text"][0]
