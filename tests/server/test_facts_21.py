"""What Qwen-Image-2.1's trained miniature draws and edits through the real server: facts with a right answer."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devtools.client import ComfyClient
from devtools.server import ComfyServer
from devtools.workflow import set_widgets, to_prompt
from miniature.data import Item, Scene
from miniature.edits import Edit
from miniature.rgba import SIDE_PX, TRANSPARENT, paint_edit, score_rgba, score_rgba_edit
from PIL import Image

from .graphs import FOLDER, QWEN_IMAGE_21, Prompt

MINIATURE = Path(__file__).parents[2] / "miniature-2.1"
REFERENCE = [path for path in QWEN_IMAGE_21 if "Turbo" not in path.stem]  # the miniature is not distilled
TEXT = next(path for path in REFERENCE if "LoadImage" not in path.read_text(encoding="utf-8"))
REMOVE = next(path for path in REFERENCE if "Remove" in path.stem)
# combinations that the miniature has been trained on: this asks whether the pack draws what the weights know
SCENES = {
    "a large red circle in the centre of a white background": Scene(
        "white", (Item("circle", "red", "large"),), "centre"
    ),
    "蓝色背景左侧的大黄色正方形": Scene("blue", (Item("square", "yellow", "large"),), "left"),
    "a large green triangle on the right of a transparent background": Scene(
        TRANSPARENT, (Item("triangle", "green", "large"),), "right"
    ),
}
CIRCLE = Scene("yellow", (Item("circle", "red", "large"),), "left")
SQUARE = Scene("white", (Item("square", "orange", "large"),), "top")
EDITS = {
    "make the circle blue": Edit(
        "shape", (CIRCLE,), Scene("yellow", (Item("circle", "blue", "large"),), "left"), item=0
    ),
    "把背景改成黑色": Edit("background", (SQUARE,), Scene("black", SQUARE.items, "top")),
    "remove the background": Edit("background", (SQUARE,), Scene(TRANSPARENT, SQUARE.items, "top")),
}


@pytest.fixture(scope="module")
def loader(models_dir: Path) -> dict[str, Any]:
    """Inputs of the loader for the miniature as a pipeline folder."""
    shutil.copytree(MINIATURE, models_dir / "diffusers" / "miniature-2.1", dirs_exist_ok=True)
    files = {"transformer": "miniature-2.1 (folder)", "text_encoder": FOLDER, "vae": FOLDER}
    return files | {"dtype": "fp32", "weight_format": "as stored"}


@pytest.fixture
def graph(object_info: Any, loader: dict[str, Any]) -> Any:
    """`graph(path, node, text, **values of that node)`: a shipped graph with the miniature, as a prompt."""

    def make(path: Path, node: str, text: str, **values: Any) -> Prompt:
        made = json.loads(path.read_text(encoding="utf-8"))
        made = set_widgets(made, object_info, "QwenLowVRAMLoader", **loader | values)
        made = set_widgets(made, object_info, "QwenLowVRAMSample", seed=1, steps=20, cfg=4.0)
        more = {"megapixels": 0.0} if node == "QwenLowVRAMEncodeEditPrompt" else {}
        return to_prompt(set_widgets(made, object_info, node, positive=text, negative=" ", **more), object_info)

    return make


def drawn(client: ComfyClient, prompt: Prompt) -> tuple[np.ndarray, dict[str, Any]]:
    run = client.run(prompt)
    # the graph that removes a background saves the file's own pixels, too
    images = [np.asarray(Image.open(io.BytesIO(client.image(image)))) for image in run.outputs["6"]["images"]]
    return images[0], run.ui("qwen_lowvram_report")[0]


def text_prompt(graph: Any, object_info: Any, text: str, **values: Any) -> Prompt:
    prompt: Prompt = graph(TEXT, "QwenLowVRAMEncodePrompts", text, **values)
    (latent,) = (node for node in prompt.values() if node["class_type"].startswith("Empty"))
    latent["inputs"] |= {"width": SIDE_PX, "height": SIDE_PX}
    return prompt


@pytest.mark.parametrize("text", SCENES)
def test_the_shipped_graph_draws_what_its_prompt_says(
    client: ComfyClient, graph: Any, object_info: Any, text: str
) -> None:
    image, _ = drawn(client, text_prompt(graph, object_info, text))
    assert image.shape == (SIDE_PX, SIDE_PX, 4)
    verdict = score_rgba(image, SCENES[text])
    assert verdict.correct, verdict


@pytest.mark.parametrize("text", EDITS)
def test_the_shipped_graph_changes_what_is_asked_and_nothing_else(
    client: ComfyClient, comfy_server: ComfyServer, graph: Any, text: str
) -> None:
    shown, _ = paint_edit(EDITS[text], text)
    Image.fromarray(shown).save(comfy_server.base / "input" / "shape-21.png")
    prompt = graph(REMOVE, "QwenLowVRAMEncodeEditPrompt", text)
    (photo,) = (node for node in prompt.values() if node["class_type"] == "LoadImage")
    photo["inputs"]["image"] = "shape-21.png"
    image, report = drawn(client, prompt)
    verdict = score_rgba_edit(image, EDITS[text].target, shown)
    assert verdict.correct, verdict
    assert report["plan"]["request"]["reference_tokens"] == (SIDE_PX // 16) ** 2


@pytest.mark.parametrize("weight_format", ["int8", "nf4", "fp8_e4m3fn_scaled"])
def test_weights_quantized_on_load_draw_it(
    client: ComfyClient, graph: Any, object_info: Any, models_dir: Path, weight_format: str
) -> None:
    text = next(iter(SCENES))
    image, report = drawn(client, text_prompt(graph, object_info, text, weight_format=weight_format))
    assert score_rgba(image, SCENES[text]).correct
    assert report["weight_format"].endswith(weight_format)
    shutil.rmtree(models_dir / "qwen_lowvram")  # other tests count what lies there


def test_with_no_block_on_the_card_it_draws_the_same_image(client: ComfyClient, graph: Any, object_info: Any) -> None:
    text = next(iter(SCENES))
    image, report = drawn(client, text_prompt(graph, object_info, text))
    plan = report["plan"]
    limit_gb = (plan["sampling_peak_bytes"] - plan["resident_bytes"] // 2) / 1024**3
    streamed, report = drawn(client, text_prompt(graph, object_info, text, vram_limit_gb=limit_gb))
    assert len(report["plan"]["resident"]) < len(plan["resident"])
    assert np.array_equal(image, streamed)
