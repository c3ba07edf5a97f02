"""The page's command that replaces ComfyUI's three loaders by ours: the same graph otherwise, and one undo."""

import copy
import json
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from devtools.browser import PageTools
from devtools.cache import REPOSITORY
from devtools.workflow import choices, to_prompt, widget_names

SWAP = REPOSITORY / "js" / "commands" / "loader_swap.js"
OURS = "QwenLowVRAMLoader"
FP8 = "fp8_e4m3fn_scaled"
# theirs, what each gives, and which of our inputs its file becomes
THEIRS = {
    "UNETLoader": ("MODEL", "unet_name", "transformer"),
    "CLIPLoader": ("CLIP", "clip_name", "text_encoder"),
    "VAELoader": ("VAE", "vae_name", "vae"),
}
RUN = """
import { readFileSync } from "node:fs";
import { swapLoaders } from "./swap.mjs";
const { graphs, inputs } = JSON.parse(readFileSync(0, "utf8"));
const familyOf = (folder, name) => (name === "renamed.safetensors" ? "qwen_image" : undefined);
console.log(JSON.stringify(graphs.map(({ graph, read }) => {
  const before = JSON.stringify(graph);
  const swapped = read ? swapLoaders(graph, inputs, familyOf) : swapLoaders(graph, inputs);
  return { ...swapped, untouched: JSON.stringify(graph) === before };
})));
"""


def _templates() -> dict[str, dict[str, Any]]:
    """ComfyUI's own graphs with a loader for a Qwen-Image model, or for one that only its text encoder tells."""
    package = find_spec("comfyui_workflow_templates_json")
    if package is None:
        return {}
    found = {}
    for path in sorted((Path(next(iter(package.submodule_search_locations or ()))) / "templates").glob("*.json")):
        text = path.read_text(encoding="utf-8")
        if '"UNETLoader"' in text and '"qwen_image"' in text and isinstance(json.loads(text), dict):
            found[path.stem] = json.loads(text)
    return found


TEMPLATES = _templates()


def _nodes(graph: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from graph["nodes"]
    for inside in graph.get("definitions", {}).get("subgraphs", []):
        yield from inside["nodes"]


@pytest.fixture(scope="session")
def loader_inputs(object_info: dict[str, Any]) -> list[dict[str, Any]]:
    """As the page hands them on."""
    specs = {
        name: spec for group in ("required", "optional") for name, spec in object_info[OURS]["input"][group].items()
    }
    assert list(specs) == [name for name in widget_names(object_info[OURS]) if name]
    return [
        {
            "name": name,
            "type": "COMBO" if isinstance(kind, list) else kind,
            "value": options.get("default", kind[0] if isinstance(kind, list) and kind else None),
        }
        for name, (kind, options) in specs.items()
    ]


@pytest.fixture(scope="session")
def swapped(
    page_tools: PageTools, loader_inputs: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Swap the loaders of many graphs at once, by what files are said to be (`read`) or by their names."""
    folder = tmp_path_factory.mktemp("swap")
    (folder / "swap.mjs").write_text(SWAP.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "run.mjs").write_text(RUN, encoding="utf-8")

    def swap(graphs: list[dict[str, Any]], *, read: bool = False) -> list[dict[str, Any]]:
        sent = json.dumps({"graphs": [{"graph": graph, "read": read} for graph in graphs], "inputs": loader_inputs})
        command = [page_tools.node, str(folder / "run.mjs")]
        done = subprocess.run(command, input=sent, capture_output=True, encoding="utf-8", check=True)
        given: list[dict[str, Any]] = json.loads(done.stdout)
        return given

    return swap


@pytest.fixture(scope="session")
def templates(swapped: Any) -> dict[str, dict[str, Any]]:
    return dict(zip(TEMPLATES, swapped(list(TEMPLATES.values())), strict=True))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_sends_the_same_prompt_but_for_its_loaders(
    name: str, templates: dict[str, dict[str, Any]], object_info: dict[str, Any]
) -> None:
    done, before = templates[name], TEMPLATES[name]
    assert done["untouched"]
    after = done["workflow"]
    _require_whole_links(after)
    if not done["replaced"]:
        assert after == before
        return
    core = {node["type"] for node in _nodes(before)}
    known = object_info | {kind: {"input": {}, "output": []} for kind in core if kind not in object_info}
    was, now = to_prompt(before, known), to_prompt(after, known)
    gone = {key: node for key, node in was.items() if key not in now}
    assert {node["class_type"] for node in gone.values()} <= {"CLIPLoader", "VAELoader"}
    ours = {key: node["inputs"] for key, node in now.items() if node["class_type"] == OURS}
    for key, inputs in ours.items():
        assert was[key]["class_type"] == "UNETLoader"
        assert inputs["transformer"] == was[key]["inputs"]["unet_name"]
    moved = 0
    for key, node in now.items():
        if key in ours:
            continue
        old = was[key]
        assert node["class_type"] == old["class_type"]
        for entry, value in node["inputs"].items():
            source = old["inputs"][entry]
            if not (isinstance(value, list) and value[0] in ours):
                assert value == source, (key, entry)
                continue
            gives, theirs, becomes = THEIRS[was[source[0]]["class_type"]]
            assert value[1] == ["MODEL", "CLIP", "VAE"].index(gives)
            assert ours[value[0]][becomes] == was[source[0]]["inputs"][theirs]
            moved += 1
    assert moved >= 3 * len(ours)
    left = {each["name"] for each in done["left"]}
    assert [n for n in now.values() if n["class_type"] == "UNETLoader" and n["inputs"]["unet_name"] not in left] == []


def _require_whole_links(graph: dict[str, Any]) -> None:
    """Ends of links name each other, in the graph and in its subgraphs."""
    for level in (graph, *graph.get("definitions", {}).get("subgraphs", [])):
        nodes = {node["id"]: node for node in level["nodes"]}
        for link in level["links"]:
            at = link if isinstance(link, list) else [
                link[part] for part in ("id", "origin_id", "origin_slot", "target_id", "target_slot")
            ]  # fmt: skip
            if at[1] in nodes and nodes[at[1]]["type"] == OURS:
                assert at[0] in nodes[at[1]]["outputs"][at[2]]["links"]
            if at[3] in nodes and nodes[at[3]]["type"] == OURS:
                assert nodes[at[3]]["inputs"][at[4]]["link"] == at[0]
            assert all(end in nodes or end < 0 for end in (at[1], at[3]))


def test_every_template_of_the_family_gets_our_loader(templates: dict[str, dict[str, Any]]) -> None:
    unchanged = {name for name, done in templates.items() if not done["replaced"]}
    named = {name for name, graph in TEMPLATES.items() if "qwen_image" in json.dumps(
        [node.get("widgets_values") for node in _nodes(graph) if node["type"] == "UNETLoader"])}  # fmt: skip
    assert len(named) > 20
    assert not unchanged & named
    for name in unchanged:  # a model that its name does not tell: the page says which
        assert [each["why"] for each in templates[name]["left"] if each["why"] != "other"] == ["unknown"], name


def test_our_loader_lies_on_nothing(templates: dict[str, dict[str, Any]]) -> None:
    for name, done in templates.items():
        for level in (done["workflow"], *done["workflow"].get("definitions", {}).get("subgraphs", [])):
            for ours in (node for node in level["nodes"] if node["type"] == OURS):
                others = (node for node in level["nodes"] if node is not ours)
                assert [other["id"] for other in others if _overlap(ours, other)] == [], (name, level.get("name"))


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    (a, b), (c, d) = ([_pair(node["pos"]), _pair(node["size"])] for node in (one, other))
    return all(a[side] < c[side] + d[side] and c[side] < a[side] + b[side] for side in (0, 1))


def _pair(given: Any) -> tuple[float, float]:
    return (given["0"], given["1"]) if isinstance(given, dict) else (given[0], given[1])


@pytest.fixture
def plain() -> dict[str, Any]:
    """A graph of ComfyUI's with its loaders and a LoRA in it, not in a subgraph."""
    return copy.deepcopy(TEMPLATES["image_qwen_image_2512_with_2steps_lora"])


def _of(graph: dict[str, Any], kind: str) -> dict[str, Any]:
    (node,) = (node for node in _nodes(graph) if node["type"] == kind)
    return node


def test_gguf_loaders_and_settings_are_taken_over(
    swapped: Any, plain: dict[str, Any], object_info: dict[str, Any]
) -> None:
    gguf = copy.deepcopy(plain)
    for kind, file in (("UNETLoader", "qwen-image-2512-Q4_K_M.gguf"), ("CLIPLoader", "Qwen2.5-VL-7B-Q4_K_M.gguf")):
        node = _of(gguf, kind)
        node["widgets_values"][0] = file
        node["type"] = {"UNETLoader": "UnetLoaderGGUF", "CLIPLoader": "CLIPLoaderGGUF"}[kind]
        del node["widgets_values"][2 if kind == "CLIPLoader" else 1 :]
    whole = copy.deepcopy(plain)
    for graph in (plain, whole):
        _of(graph, "UNETLoader")["widgets_values"][1] = "fp8_e4m3fn_fast"
        _of(graph, "CLIPLoader")["widgets_values"][2] = "cpu"
    _of(whole, "UNETLoader")["widgets_values"][0] = "qwen_image_2512_bf16.safetensors"
    of_gguf, of_plain, of_whole = swapped([gguf, plain, whole])
    names = list(widget_names(object_info[OURS]))
    values = dict(zip(names, _of(of_gguf["workflow"], OURS)["widgets_values"], strict=True))
    assert values["transformer"] == "qwen-image-2512-Q4_K_M.gguf"
    assert values["text_encoder"] == "Qwen2.5-VL-7B-Q4_K_M.gguf"
    assert values["weight_format"] == "auto"
    values = dict(zip(names, _of(of_plain["workflow"], OURS)["widgets_values"], strict=True))
    assert (values["weight_format"], values["text_encoder_device"]) == ("auto", "cpu")
    values = dict(zip(names, _of(of_whole["workflow"], OURS)["widgets_values"], strict=True))
    assert values["weight_format"] == FP8
    assert FP8 in choices(object_info, OURS, "weight_format")
    assert [done["replaced"][0]["quantized"] for done in (of_plain, of_whole)] == [False, True]
    assert (
        _of(of_plain["workflow"], "LoraLoaderModelOnly")["widgets_values"]
        == (_of(plain, "LoraLoaderModelOnly")["widgets_values"])
    )


def test_a_setting_that_a_subgraph_hands_out_is_said_in_our_words(
    templates: dict[str, dict[str, Any]], object_info: dict[str, Any]
) -> None:
    prompt = to_prompt(templates["image_qwen_image_layered_control"]["workflow"], object_info)
    (ours,) = (node["inputs"] for node in prompt.values() if node["class_type"] == OURS)
    assert ours["weight_format"] == FP8
    assert ours["transformer"] == "qwen_image_layered_control_bf16.safetensors"


@pytest.mark.parametrize("read", [True, False], ids=["by-its-header", "by-its-name"])
def test_a_file_whose_name_says_nothing_is_replaced_only_where_its_header_tells(
    swapped: Any, plain: dict[str, Any], read: bool
) -> None:
    node = _of(plain, "UNETLoader")
    node["widgets_values"][0] = "renamed.safetensors"
    (done,) = swapped([plain], read=read)
    assert [each["transformer"] for each in done["replaced"]] == (["renamed.safetensors"] if read else [])
    assert [each["why"] for each in done["left"]] == ([] if read else ["unknown"])
    assert read or done["workflow"] == plain


def test_another_models_loaders_stay_beside_ours(swapped: Any, plain: dict[str, Any]) -> None:
    """A second model refines what the first one made, with a text encoder of its own, and perhaps the same VAE."""
    refiner = []
    for number, (kind, file) in enumerate(
        {"UNETLoader": "z_image_turbo_bf16.safetensors", "CLIPLoader": "qwen_3_4b.safetensors"}.items(), start=900
    ):
        node = copy.deepcopy(_of(plain, kind)) | {"id": number, "pos": [9000, 300 * (number - 900)]}
        node["outputs"][0]["links"] = []
        node["widgets_values"][0] = file
        refiner.append(node)
    refiner[1]["widgets_values"][1] = "lumina2"
    plain["nodes"] += refiner
    _of(plain, "VAELoader")["widgets_values"][0] = "wan_2.1_vae.safetensors"
    (done,) = swapped([plain])
    assert [each["vae"] for each in done["replaced"]] == ["wan_2.1_vae.safetensors"]
    assert {(each["name"], each["why"]) for each in done["left"]} == {
        ("wan_2.1_vae.safetensors", "kept"),
        ("z_image_turbo_bf16.safetensors", "other"),
    }
    kept = [node for node in done["workflow"]["nodes"] if node["id"] in (900, 901)]
    assert kept == refiner
    vae = _of(done["workflow"], "VAELoader")
    assert vae["outputs"] == _of(plain, "VAELoader")["outputs"]


def test_no_text_encoder_is_taken_that_is_not_there(swapped: Any, plain: dict[str, Any]) -> None:
    _of(plain, "CLIPLoader")["widgets_values"][1] = "lumina2"
    (done,) = swapped([plain])
    assert done["replaced"] == []
    assert [each["why"] for each in done["left"]] == ["alone"]


TEMPLATE = "image_qwen_image_edit_2511"  # its loaders are in a subgraph that hands their files out
PRESS = "() => window.app.extensionManager.command.execute('qwenLowVRAM.useLoader')"
UNDO = "() => window.app.extensionManager.command.execute('Comfy.Undo')"
KINDS = """() => {
  const graphs = [window.app.rootGraph, ...window.app.rootGraph.subgraphs.values()];
  return graphs.flatMap((graph) => graph.nodes.map((node) => node.type)).filter((type) => /Loader/.test(type)).sort();
}"""
TOAST = "() => [...document.querySelectorAll('.p-toast-message')].map((toast) => toast.innerText).join('\\n')"


@pytest.fixture(scope="module")
def page(open_page: Any) -> Any:
    """Of its own: templates whose files are missing leave dialogs open."""
    return open_page()


def test_the_command_replaces_them_in_the_page_and_one_undo_brings_them_back(page: Any) -> None:
    page.load(TEMPLATES[TEMPLATE])
    before, kinds = page.prompt(), page.evaluate(KINDS)
    page.evaluate(PRESS)
    after = page.prompt()
    assert page.evaluate(KINDS) == ["LoraLoaderModelOnly", OURS]
    (ours,) = (node["inputs"] for node in after.values() if node["class_type"] == OURS)
    assert ours["transformer"] == "qwen_image_edit_2511_fp8mixed.safetensors"
    assert ours["text_encoder"] == "qwen_2.5_vl_7b_fp8_scaled.safetensors"
    assert ours["vae"] == "qwen_image_vae.safetensors"
    assert set(after) < set(before)
    shown = page.evaluate(TOAST)
    assert "qwen_image_edit_2511_fp8mixed.safetensors" in shown
    assert "Undo brings the old loaders back." in shown
    page.screenshot("use-loader")
    page.evaluate(UNDO)
    assert page.evaluate(KINDS) == kinds
    assert page.prompt() == before
    # the page itself warns of its own template, and of images that are not there
    assert [line for line in page.unexpected_messages() if "/extensions/" in line or "pageerror" in line] == []


def test_the_command_says_why_it_replaced_nothing(page: Any) -> None:
    page.load({"nodes": [], "links": [], "version": 0.4})
    page.evaluate(PRESS)
    assert "No loader was replaced" in page.evaluate(TOAST)
