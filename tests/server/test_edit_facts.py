"""What an edit changes and what it leaves, asked of the trained editing miniature through the real server."""

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devtools.client import ComfyClient
from devtools.server import ComfyServer
from devtools.workflow import set_widgets, to_prompt
from miniature.data import Item, Scene
from miniature.edits import Edit, paint_edit
from miniature.scorer import score_edit
from PIL import Image
from split_files import write_split_files

from .graphs import FOLDER, ONE_IMAGE, SEVERAL_IMAGES, Prompt, changed, with_inputs

MINIATURE = Path(__file__).parents[2] / "miniature-edit"
ONE, SEVERAL = ONE_IMAGE, SEVERAL_IMAGES
GUIDED = {"preset": "as set", "scheduler": "qwen_image", "steps": 20, "cfg": 4.0}
# combinations that the miniature has been trained on: this asks whether the pack edits as the weights know to
CIRCLE = Scene("yellow", (Item("circle", "red", "large"),), "left")
PAIR = Scene("white", (Item("square", "green", "large"), Item("triangle", "red", "small")), "above")
ON_BLACK = Scene("black", (Item("square", "orange", "small"),), "top")
RECOLOURED = Edit("shape", (CIRCLE,), Scene("yellow", (Item("circle", "blue", "large"),), "left"), item=0)
OF_TWO = Edit(
    "shape",
    (PAIR,),
    Scene("white", (Item("square", "green", "large"), Item("triangle", "purple", "small")), "above"),
    item=1,
)
GROUND = Edit("background", (PAIR,), Scene("blue", PAIR.items, "above"))
FIRST_ON_SECOND = Edit("together", (CIRCLE, ON_BLACK), Scene("black", CIRCLE.items, "left"))
SECOND_ON_FIRST = Edit("together", (CIRCLE, ON_BLACK), Scene("yellow", ON_BLACK.items, "top"), kept=1)
CASES = [
    (ONE, RECOLOURED, "make the circle blue"),
    (ONE, OF_TWO, "把三角形变成紫色"),
    (ONE, GROUND, "change the background to blue"),
    (ONE, GROUND, "把背景改成蓝色"),
    (SEVERAL, FIRST_ON_SECOND, "put the shape of picture 1 on the background of picture 2"),
    (SEVERAL, SECOND_ON_FIRST, "把图2的图形放到图1的背景上"),
]


@pytest.fixture(scope="module")
def loader(models_dir: Path) -> dict[str, Any]:
    """Inputs of the loader for the editing miniature as a pipeline folder, its variant found."""
    target = models_dir / "diffusers" / "miniature-edit"
    if not target.exists():
        shutil.copytree(MINIATURE, target)
    return {
        "transformer": "miniature-edit (folder)", "text_encoder": FOLDER, "vae": FOLDER, "dtype": "fp32",
        "weight_format": "as stored",
    }  # fmt: skip


@pytest.fixture
def graph(object_info: Any, loader: dict[str, Any], comfy_server: ComfyServer) -> Any:
    """`graph(path, edit, text, seed, **loader inputs)`: a shipped graph that shows the edit's images, as a prompt."""

    def make(path: Path, edit: Edit, text: str, seed: int = 1, **inputs: Any) -> Prompt:
        made = json.loads(path.read_text(encoding="utf-8"))
        shown, _ = paint_edit(edit, "server")
        places = [node for node in made["nodes"] if node["type"] == "LoadImage"]
        for i, node in enumerate(places):
            if i < len(shown):
                name = f"{edit.kind}{i}-{random.Random(repr(edit)).randrange(10**6)}.png"
                Image.fromarray(shown[i]).save(comfy_server.base / "input" / name)
                node["widgets_values"][0] = name
            else:
                node["mode"] = 2  # muted: the third image is left free
        made = set_widgets(made, object_info, "QwenLowVRAMLoader", **loader | inputs)
        made = set_widgets(
            made, object_info, "QwenLowVRAMEncodeEditPrompt", positive=text, negative=" ", megapixels=0.0
        )
        # as the note says of guided steps: the editing miniature has no Lightning
        made = set_widgets(made, object_info, "QwenLowVRAMSample", **GUIDED, seed=seed)
        for node in made["nodes"]:
            if node["type"] == "QwenLowVRAMLoadLora":
                node["mode"] = 4  # bypassed
        return to_prompt(made, object_info)

    return make


def assert_edited(client: ComfyClient, prompt: Prompt, edit: Edit) -> dict[str, Any]:
    run = client.run(prompt)
    image = np.asarray(Image.open(io.BytesIO(client.image(run.images()[0]))).convert("RGB"))
    shown, _ = paint_edit(edit, "server")
    verdict = score_edit(image, edit.target, shown[edit.kept])
    assert verdict.correct, verdict
    report: dict[str, Any] = run.ui("qwen_lowvram_report")[0]
    return report


@pytest.mark.parametrize(("path", "edit", "text"), CASES, ids=[text for _, _, text in CASES])
def test_a_shipped_edit_graph_changes_what_is_asked_and_nothing_else(
    client: ComfyClient, graph: Any, path: Path, edit: Edit, text: str
) -> None:
    report = assert_edited(client, graph(path, edit, text), edit)
    assert report["plan"]["request"]["reference_tokens"] == 64 * len(edit.sources)


def test_with_fewer_blocks_resident_it_edits_alike(client: ComfyClient, graph: Any) -> None:
    path, edit, text = CASES[-1]
    plan = assert_edited(client, graph(path, edit, text, seed=2), edit)["plan"]
    assert plan["resident"]
    limit_gb = (plan["sampling_peak_bytes"] - plan["resident_bytes"] // 2) / 1024**3
    streamed = assert_edited(client, graph(path, edit, text, seed=2, vram_limit_gb=limit_gb), edit)["plan"]
    assert len(streamed["resident"]) < len(plan["resident"])


@pytest.mark.parametrize("weight_format", ["fp8_e4m3fn_scaled", "int8", "nf4"])
def test_weights_quantized_on_load_edit_alike(
    client: ComfyClient, graph: Any, models_dir: Path, weight_format: str
) -> None:
    path, edit, text = CASES[0]
    report = assert_edited(client, graph(path, edit, text, weight_format=weight_format), edit)
    assert report["weight_format"].endswith(weight_format)
    shutil.rmtree(models_dir / "qwen_lowvram")  # other tests count what lies there


@pytest.mark.parametrize("storage", ["bf16", "fp8_scaled", "gguf_q8_0"])
def test_files_edit_alike(client: ComfyClient, graph: Any, models_dir: Path, storage: str) -> None:
    # the miniature's own small vocabulary lies in the folder, so the prompts are encoded by the folder's CLIP
    files = write_split_files(MINIATURE, models_dir, dtype=storage, name="miniature-edit-2509")
    path, edit, text = CASES[0]
    prompt = graph(path, edit, text)
    split = {"transformer": files.transformer, "text_encoder": files.text_encoder, "vae": files.vae}
    prompt = changed(prompt, n20=("QwenLowVRAMLoader", {**prompt["1"]["inputs"], **split}))
    assert_edited(client, with_inputs(prompt, "4", model=["20", 0]), edit)
