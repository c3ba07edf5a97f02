"""What ships in workflows/: made by the maker, with links to every file, in titled steps, nothing upon anything."""

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import make_workflows
import pytest
import stated_plans
from devtools.cache import REPOSITORY
from qwenimage_lowvram.engine.planning.cards import typical_limit_bytes
from qwenimage_lowvram.engine.planning.request import GIB
from workflow_maker.canvas import TITLE_PX
from workflow_maker.catalogue import workflows
from workflow_maker.texts import LICENCE_21

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = REPOSITORY / "workflows"
KNOWN = dict(workflows())
FILES = [FOLDER / f"{stem}.json" for stem in KNOWN]
LOADER, LOAD_LORA = "QwenLowVRAMLoader", "QwenLowVRAMLoadLora"
HUB = "https://huggingface.co"
# whose files the workflows link: those that ComfyUI's own templates link, Lightning's makers, and Unsloth's GGUF
REPOSITORIES = (
    "Comfy-Org/Qwen-Image_ComfyUI",
    "Comfy-Org/Qwen-Image-Edit_ComfyUI",
    "Comfy-Org/Qwen-Image-Layered_ComfyUI",
    "Comfy-Org/Qwen-Image-2.1",
    "lightx2v/Qwen-Image-Lightning",
    "lightx2v/Qwen-Image-Edit-2511-Lightning",
    "unsloth/Qwen-Image-Edit-2511-GGUF",
)

each_workflow = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def graph_of(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def only(graph: Mapping[str, Any], kind: str) -> dict[str, Any]:
    (node,) = (node for node in graph["nodes"] if node["type"] == kind)
    return dict(node)


@each_workflow
def test_a_workflow_is_what_its_maker_makes(file: Path) -> None:
    """Its note states the plan of its settings at the real size; tools/make_workflows.py writes it."""
    made = make_workflows.as_text(KNOWN[file.stem].graph())
    assert file.read_text(encoding="utf-8") == made


def test_there_are_no_others_and_each_has_a_thumbnail_of_its_own() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == list(KNOWN)
    thumbnails = {path.stem: path.read_bytes() for path in FOLDER.glob("*.jpg")}
    assert sorted(thumbnails) == list(KNOWN)
    for stem, image in thumbnails.items():
        assert image.startswith(b"\xff\xd8\xff"), stem
        assert len(image) < 100_000, stem
    seen = Counter(thumbnails.values())
    assert [stem for stem, image in thumbnails.items() if seen[image] > 1] == []


def test_titles_begin_with_what_people_search_for() -> None:
    """The template browser's search, Fuse, knows an extension's workflows by their names alone, and finds "low vram" in
    them only where it stands near the beginning (a distance of 100 at a threshold of 0.33)."""
    for stem in KNOWN:
        assert re.match(r"\d\d - Low VRAM \d+ GB - ", stem), stem
        assert len(stem) < 80, stem
    assert list(KNOWN) == sorted(KNOWN)


@each_workflow
def test_our_nodes_say_which_pack_they_are_of(file: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    said = {
        "cnr_id": project["name"],
        "ver": project["version"],
        "aux_id": project["urls"]["Repository"].removeprefix("https://github.com/"),
    }
    ours = [node for node in stated_plans.all_nodes(graph_of(file)) if node["type"].startswith("QwenLowVRAM")]
    assert len(ours) >= 4
    for node in ours:
        assert {name: node["properties"].get(name) for name in said} == said, node["type"]


@each_workflow
def test_a_workflow_says_where_its_models_are(file: Path) -> None:
    graph = graph_of(file)
    loader, note = only(graph, LOADER), only(graph, "MarkdownNote")["widgets_values"][0]
    models = loader["properties"]["models"]
    assert [model["name"] for model in models] == loader["widgets_values"][:3]
    assert [model["directory"] for model in models] == ["diffusion_models", "text_encoders", "vae"]
    for lora in (node for node in graph["nodes"] if node["type"] == LOAD_LORA):
        models += lora["properties"]["models"]
        assert [model["name"] for model in lora["properties"]["models"]] == lora["widgets_values"][:1]
        assert models[-1]["directory"] == "loras"
    for model in models:
        repository = re.fullmatch(rf"{HUB}/([^/]+/[^/]+)/resolve/main/(?:.*/)?{re.escape(model['name'])}", model["url"])
        assert repository, model["url"]
        assert repository[1] in REPOSITORIES
        assert f"- models/{model['directory']}/ [{model['name']}]({model['url']})" in note


@each_workflow
def test_a_workflow_begins_with_a_licence_that_forbids_something(file: Path) -> None:
    graph = graph_of(file)
    transformer, note = only(graph, LOADER)["widgets_values"][0], only(graph, "MarkdownNote")["widgets_values"][0]
    model = "Qwen-Image-2.1-Turbo" if "turbo" in transformer else "Qwen-Image-2.1"
    assert (note.splitlines()[0] == f"{model} {LICENCE_21}") == ("2.1" in transformer)
    assert ("License" in note) == ("2.1" in transformer)


@each_workflow
def test_limits_are_those_that_memory_plan_gives_the_card(file: Path) -> None:
    card_gb = int(re.findall(r"(\d+) GB", file.stem)[0])
    loader = stated_plans.widgets(graph_of(file), LOADER)
    assert loader["vram_limit_gb"] == pytest.approx(typical_limit_bytes(card_gb) / GIB, abs=0.01)
    assert loader["ram_limit_gb"] == 0
    assert not file.stem.startswith("01") or loader["vram_limit_gb"] == 3.0


@each_workflow
def test_lightning_is_never_put_upon_unscaled_fp8(file: Path) -> None:
    graph = graph_of(file)
    if LOAD_LORA in {node["type"] for node in graph["nodes"]}:
        transformer = only(graph, LOADER)["widgets_values"][0]
        assert any(kind in transformer for kind in ("scaled", "mixed", "Q4_K_M")), transformer
        assert stated_plans.widgets(graph, "QwenLowVRAMSample")["cfg"] == 1


@each_workflow
def test_notes_give_ranges_and_no_cards_seconds(file: Path) -> None:
    note = only(graph_of(file), "MarkdownNote")["widgets_values"][0]
    assert re.search(r"steps take (\d+ (s )?to \d+|about \d+) (s|minutes?), .*forecasts from the data sheets", note)
    assert "Nobody has measured this." in note
    assert "TFLOP" not in note


Box = tuple[int, int, int, int]  # left, top, right, bottom


def box_of(node: Mapping[str, Any]) -> Box:
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE_PX, left + width, top + height


def apart(one: Box, other: Box) -> bool:
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


@each_workflow
def test_nothing_lies_upon_anything_and_every_node_stands_in_one_titled_step(file: Path) -> None:
    """Before a run; the page's tests look at it after one."""
    graph = graph_of(file)
    frames = {}
    for group in graph["groups"]:
        left, top, width, height = group["bounding"]
        frames[group["title"]] = (left, top, left + width, top + height)
    assert [re.findall(r"Step (\d): \w+", title) for title in frames] == [[str(i + 1)] for i in range(len(frames))]
    boxes = {node["id"]: box_of(node) for node in graph["nodes"]}
    everything = [*boxes.values()]
    assert all(apart(one, other) for i, one in enumerate(everything) for other in everything[:i])
    around = [*frames.values()]
    assert all(apart(one, other) for i, one in enumerate(around) for other in around[:i])
    for node in graph["nodes"]:
        left, top, right, bottom = boxes[node["id"]]
        inside = [f for f in around if f[0] <= left and f[1] <= top and right <= f[2] and bottom <= f[3]]
        assert len(inside) == (node["type"] != "MarkdownNote"), node["type"]


@each_workflow
def test_decode_stands_to_the_right_of_sample(file: Path) -> None:
    graph = graph_of(file)
    sample, decode = box_of(only(graph, "QwenLowVRAMSample")), box_of(only(graph, "QwenLowVRAMDecode"))
    assert decode[0] > sample[2]
    assert decode[1] == sample[1]


@pytest.mark.parametrize("name", ["Inpaint", "Outpaint", "layers"])
def test_plumbing_is_in_a_subgraph(name: str) -> None:
    (file,) = (file for file in FILES if name in file.stem)
    graph = graph_of(file)
    (inside,) = graph["definitions"]["subgraphs"]
    assert inside["name"].startswith("Prepare image and ")
    outside = {node["type"] for node in graph["nodes"]}
    assert not outside & {"MaskToImage", "ImageToMask", "ImageBlur", "VAEEncode", "ReferenceLatent", "GetImageSize"}


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_readme_says_what_its_workflows_take(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    cells = r"^\| \d+ GB \| (\d\d)(\D.*?) \| .*\| ([\d.]+) / ([\d.]+) GiB \|"
    rows = re.findall(cells, text, re.MULTILINE)
    assert len(rows) == 10
    for number, what, vram, ram in rows:
        (file,) = (file for file in FILES if file.stem.startswith(number))
        limit = re.search(r"\*(?:vram_limit_gb\* |显存上限\*设为 )(\d+)", what)
        plan = stated_plans.plan_of(graph_of(file), **({"vram_limit_gb": float(limit[1])} if limit else {}))
        assert (vram, ram) == (f"{plan.peak_bytes / GIB:.1f}", f"{plan.ram_peak_bytes / GIB:.1f}"), file.stem
