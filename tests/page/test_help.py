"""Help pages and translations: complete, in step with the nodes, served by the real server, shown by the page."""

import json
import re
from typing import Any

import pytest
from devtools.cache import REPOSITORY
from devtools.client import ComfyClient
from devtools.server import PACK_NAME
from devtools.workflow import to_prompt

from .conftest import in_chinese

NODES = (
    "QwenLowVRAMLoader",
    "QwenLowVRAMLoadLora",
    "QwenLowVRAMEncodePrompts",
    "QwenLowVRAMEncodeEditPrompt",
    "QwenLowVRAMSample",
    "QwenLowVRAMDecode",
    "QwenLowVRAMMemoryPlan",
    "QwenLowVRAMMemoryReport",
    "QwenLowVRAMWeightCache",
    "QwenLowVRAMBenchmark",
)
LANGUAGES = ("en", "zh")
HEADINGS = {
    "en": ["Inputs", "Output", "What to expect", "Troubleshooting"],
    "zh": ["输入", "输出", "预期", "疑难解答"],
}
# inputs whose label on the page is another word than their id, which saved graphs hold
LABELS = {"reference_pictures": "reference_images"}
WORKFLOW = min((REPOSITORY / "workflows").glob("*4 GB - Qwen-Image.json"))


def help_path(node: str, language: str) -> str:
    return f"js/docs/{node}.md" if language == "en" else f"js/docs/{node}/{language}.md"


def node_defs(language: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def inputs_of(node_info: dict[str, Any]) -> dict[str, Any]:
    groups = (node_info["input"].get(group, {}) for group in ("required", "optional"))  # what a person sees
    return {name: spec for group in groups for name, spec in group.items()}


def test_the_nodes_here_are_those_of_the_pack(object_info: dict[str, Any]) -> None:
    ours = {name for name, info in object_info.items() if info["python_module"] == f"custom_nodes.{PACK_NAME}"}
    assert ours == set(NODES)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", NODES)
def test_every_node_has_a_help_page_that_names_every_input(
    client: ComfyClient, object_info: dict[str, Any], node: str, language: str
) -> None:
    served = client.get_bytes(f"/extensions/{PACK_NAME}/{help_path(node, language).removeprefix('js/')}").decode()
    assert served == (REPOSITORY / help_path(node, language)).read_text(encoding="utf-8")
    defs = node_defs(language)[node]
    assert served.startswith(f"# {defs['display_name']}\n")
    headings = re.findall(r"^## (.+)$", served, re.MULTILINE)
    for wanted in HEADINGS[language]:
        assert any(heading.startswith(wanted) for heading in headings), wanted
    rows = [line.split("|")[1] for line in served.splitlines() if line.startswith("| ")]
    for name in inputs_of(object_info[node]):
        shown = defs["inputs"][name]["name"]
        assert any(shown in row and (name in row or name == shown.lower()) for row in rows), name


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_name_every_input_and_output_and_no_other(object_info: dict[str, Any], language: str) -> None:
    defs = node_defs(language)
    assert set(defs) == set(NODES)
    for node, texts in defs.items():
        info = object_info[node]
        assert list(texts["inputs"]) == list(inputs_of(info)), node
        assert list(texts["outputs"]) == [str(index) for index in range(len(info["output"]))], node
        entries = [texts["display_name"], texts["description"]]
        entries += [text for part in (*texts["inputs"].values(), *texts["outputs"].values()) for text in part.values()]
        for text in entries:
            assert text.strip()
            assert not re.search(r"[{}@|]", text), f"the page's translator reads these marks as code: {text}"


def test_the_english_texts_are_the_nodes_own(object_info: dict[str, Any]) -> None:
    for node, texts in node_defs("en").items():
        info = object_info[node]
        assert (texts["display_name"], texts["description"]) == (info["display_name"], info["description"])
        for name, spec in inputs_of(info).items():
            assert texts["inputs"][name] == {"name": LABELS.get(name, name), "tooltip": spec[1]["tooltip"]}, (
                f"{node}.{name}: the tooltip changed. Change locales/en/nodeDefs.json, and the other languages, too."
            )
        outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
        assert list(texts["outputs"].values()) == [{"name": name, "tooltip": tip} for name, tip in outputs], node


def test_the_server_serves_the_translations(client: ComfyClient) -> None:
    served = client.get("/i18n")
    for language in LANGUAGES:
        for node, texts in node_defs(language).items():
            assert served[language]["nodeDefs"][node] == texts
    assert "Qwen-Image (low VRAM)" in served["zh"]["nodeCategories"]
    for command, texts in served["en"]["commands"].items():  # the page's menu asks for them by their English labels
        assert served["zh"]["menuLabels"][texts["label"]] == served["zh"]["commands"][command]["label"]


def test_the_server_lists_the_workflows_with_their_thumbnails(client: ComfyClient) -> None:
    names = client.get("/workflow_templates")[PACK_NAME]
    assert sorted(names) == sorted(path.stem for path in (REPOSITORY / "workflows").glob("*.json"))
    for name in names:
        path = f"/api/workflow_templates/{PACK_NAME}/{name}".replace(" ", "%20")
        assert json.loads(client.get_bytes(f"{path}.json"))["nodes"]
        assert client.get_bytes(f"{path}.jpg").startswith(b"\xff\xd8\xff")


@in_chinese
def test_a_chinese_page_shows_chinese_names_and_sends_the_same_prompt(page: Any, object_info: dict[str, Any]) -> None:
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    page.load(graph)
    titles = page.evaluate("() => window.app.graph.nodes.map((node) => node.title)")
    shown = {node["type"] for node in graph["nodes"]} & set(NODES)
    assert len(shown) == 4
    assert {node_defs("zh")[node]["display_name"] for node in shown} <= set(titles)
    assert "说明" in titles
    groups = page.evaluate("() => window.app.graph.groups.map((group) => group.title)")
    assert groups[0] == "第 1 步：模型文件"
    labels = page.evaluate("() => window.app.graph.getNodeById(4).widgets.map((w) => w.label ?? w.name)")
    assert {"步数", "采样器", "范数校正"} <= set(labels)
    prompt = {key: {part: node[part] for part in ("class_type", "inputs")} for key, node in page.prompt().items()}
    assert prompt == to_prompt(graph, object_info)
    assert page.unexpected_messages() == []
