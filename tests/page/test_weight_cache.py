"""The Quantized Weights node shows its list, on the page as in the output, and saves nothing of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from devtools.client import ComfyClient

VUE_NODES = "Comfy.VueNodes.Enabled"
ADD = """() => {
  const graph = window.app.graph;
  graph.clear();
  const node = window.LiteGraph.createNode('QwenLowVRAMWeightCache');
  graph.add(node);
  return node.id;
}"""
SHOWN = "() => document.querySelector('.qwen-lowvram-weights').innerText"


@pytest.fixture(scope="module", params=[False, True], ids=["classic-nodes", "vue-nodes"])
def page(request: pytest.FixtureRequest, open_page: Any, client: ComfyClient) -> Iterator[Any]:
    yield open_page({VUE_NODES: request.param})
    client.post("/settings", {VUE_NODES: False})  # the server keeps settings for the next page


def test_the_node_shows_its_list_on_the_page(page: Any, models_dir: Path) -> None:
    node = page.evaluate(ADD)
    assert page.evaluate("() => new Promise((done) => setTimeout(done, 500))") is None
    assert page.evaluate(SHOWN) == "Run the graph to see the files."
    assert page.run()["status"] == "success"
    first, *others = page.evaluate(SHOWN).splitlines()
    assert first == f"{models_dir / 'qwen_lowvram'}: nothing"
    assert others[0].startswith("prompts: ")
    prompt = page.prompt()
    assert prompt[str(node)]["inputs"] == {"action": "show"}
    (saved,) = page.serialize()["nodes"]
    assert saved["widgets_values"] == ["show"]
    page.screenshot("weight-cache")
    assert page.unexpected_messages() == []
