"""The page opens without complaints, runs a graph, and converts graphs as our own converter does; bundled workflows are
converted in test_workflow."""

from typing import Any

import pytest
from devtools.workflow import to_prompt

TEXT = "(a:1.2) cat"


def native_graph(bypassed: bool = False) -> dict[str, Any]:
    """A graph of ComfyUI's own nodes: seed control, a note, a link over a widget, a muted and a bypassed node."""

    def node(identity: int, kind: str, inputs: list[Any], outputs: list[Any], values: list[Any], mode: int = 0) -> Any:
        return {
            "id": identity, "type": kind, "pos": [60 + 340 * identity, 120], "size": [300, 200], "flags": {},
            "order": identity, "mode": mode, "properties": {}, "inputs": inputs, "outputs": outputs,
            "widgets_values": values,
        }  # fmt: skip

    image = [{"name": "IMAGE", "type": "IMAGE", "links": [1]}]
    return {
        "id": "0c4ac0a4-6a4f-4a9b-8a5c-3c8f1f6d2b11", "revision": 0, "last_node_id": 6, "last_link_id": 4,
        "nodes": [
            node(1, "EmptyImage", [], image, [64, 32, 1, 255]),
            node(2, "ImageInvert", [{"name": "image", "type": "IMAGE", "link": 1}],
                 [{"name": "IMAGE", "type": "IMAGE", "links": [2, 3]}], [], 4 if bypassed else 0),
            node(3, "SaveImage", [{"name": "images", "type": "IMAGE", "link": 2}], [], ["page"]),
            node(4, "PreviewImage", [{"name": "images", "type": "IMAGE", "link": 3}], [], [], 2),
            node(5, "Note", [], [], [TEXT]),
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"], [3, 2, 0, 4, 0, "IMAGE"]],
        "groups": [], "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def without_titles(prompt: dict[str, Any]) -> dict[str, Any]:
    return {key: {name: part for name, part in node.items() if name != "_meta"} for key, node in prompt.items()}


def test_the_page_opens_without_a_message_of_ours(page: Any) -> None:
    assert page.unexpected_messages() == []


@pytest.mark.parametrize("bypassed", [False, True])
def test_our_conversion_equals_the_pages(page: Any, object_info: dict[str, Any], bypassed: bool) -> None:
    page.load(native_graph(bypassed))
    assert without_titles(page.prompt()) == to_prompt(native_graph(bypassed), object_info)


def test_our_conversion_of_the_default_graph_equals_the_pages(page: Any, object_info: dict[str, Any]) -> None:
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.LoadDefaultWorkflow')")
    graph = page.serialize()
    assert "KSampler" in {node["type"] for node in graph["nodes"]}
    assert without_titles(page.prompt()) == to_prompt(graph, object_info)


def test_a_graph_runs_in_the_page_to_its_image(page: Any) -> None:
    page.load(native_graph())
    assert page.run()["status"] == "success"
    page.evaluate("() => new Promise((done) => setTimeout(done, 1000))")
    assert page.screenshot("native-graph").stat().st_size > 10_000
    assert page.unexpected_messages() == []


def test_a_refused_graph_comes_back_with_the_servers_words(page: Any) -> None:
    graph = native_graph()
    graph["nodes"][0]["widgets_values"][0] = -64
    page.load(graph)
    answer = page.run()
    assert answer["status"] == "refused"
    assert "1" in answer["detail"]
