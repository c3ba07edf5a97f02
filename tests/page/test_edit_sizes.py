"""Encode Edit Prompt shows the sizes that it used on the page, and saves nothing of them."""

from pathlib import Path
from typing import Any

from .conftest import in_both_renderers

pytestmark = in_both_renderers
ADD = """([loader, width]) => {
  const graph = window.app.graph;
  graph.clear();
  const add = (kind) => { const node = window.LiteGraph.createNode(kind); graph.add(node); return node; };
  const set = (node, values) => {
    for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value;
  };
  const [load, edit, save] = ['QwenLowVRAMLoader', 'QwenLowVRAMEncodeEditPrompt', 'SaveLatent'].map(add);
  set(load, loader);
  set(edit, { width, height: 64 });
  load.connect(1, edit, 0);
  load.connect(2, edit, 1);
  edit.connect(2, save, 0);
  return edit.id;
}"""
SHOWN = "() => document.querySelector('.qwen-lowvram-sizes').innerText"


def test_the_sizes_are_shown_on_the_node(page: Any, vue: bool, full_pipeline: Path, models_dir: Path) -> None:
    folder = {"text_encoder": "from the folder", "vae": "from the folder", "dtype": "fp32"}
    # another one for each page: what the server has made already it does not tell again
    width = 96 if vue else 112
    node = page.evaluate(ADD, [{"transformer": f"{full_pipeline.name} (folder)", **folder}, width])
    assert page.evaluate("() => new Promise((done) => setTimeout(done, 500))") is None
    assert page.evaluate(SHOWN) == "Run the graph to see the sizes."
    assert page.run()["status"] == "success"
    assert page.evaluate(SHOWN) == f"output {width}x64"
    inputs = page.prompt()[str(node)]["inputs"]
    assert "qwen_lowvram_sizes" not in inputs
    saved = next(entry for entry in page.serialize()["nodes"] if str(entry["id"]) == str(node))
    widgets = set(inputs) - {"clip", "vae"}
    assert len(saved["widgets_values"]) == len(widgets)
    page.screenshot("edit-sizes")
    assert page.unexpected_messages() == []
