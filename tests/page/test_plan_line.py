"""The loader says what the next run would take, while the graph is being changed; in both renderers."""

import json
from pathlib import Path
from typing import Any

from devtools.workflow import set_widgets
from small_checkpoint import SplitFiles

from .conftest import in_both_renderers

pytestmark = in_both_renderers
WORKFLOW = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))[0]
LINE = """async (wanted) => {
  const of = (name) => window.app.graph.nodes.find((node) => node.type === 'QwenLowVRAMLoader').widgets.find(
    (widget) => widget.name === name);
  const panel = of('qwen_lowvram_plan_line').element.querySelector('.qwen-lowvram-plan-line');
  for (let waited = 0; waited < 60000 && panel.dataset.fits !== wanted; waited += 100)
    await new Promise((done) => setTimeout(done, 100));
  const sample = window.app.graph.nodes.find((node) => node.type === 'QwenLowVRAMSample');
  const shown = sample.widgets.find((widget) => widget.name === 'qwen_lowvram_progress').element.textContent;
  return [panel.dataset.fits, panel.textContent, shown];
}"""
SET = """([kind, name, value]) => {
  const node = window.app.graph.nodes.find((node) => node.type === kind);
  node.widgets.find((widget) => widget.name === name).value = value;
  window.comfyAPI.api.api.dispatchCustomEvent('graphChanged');
}"""


def test_the_line_follows_the_graph_and_turns_red_where_it_does_not_fit(
    page: Any, object_info: dict[str, Any], split_files: dict[str, SplitFiles]
) -> None:
    names = split_files["fp8"]
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    files = {"transformer": names.transformer, "text_encoder": names.text_encoder, "vae": names.vae}
    graph = set_widgets(graph, object_info, "QwenLowVRAMLoader", **files)
    page.load(graph)
    fits, text, sample = page.evaluate(LINE, "true")
    assert fits == "true"
    assert "blocks on the card" in text
    assert text in sample
    page.screenshot("plan-line")
    page.evaluate(SET, ["EmptySD3LatentImage", "width", 16384])
    page.evaluate(SET, ["QwenLowVRAMLoader", "vram_limit_gb", 0.1])
    fits, text, sample = page.evaluate(LINE, "false")
    assert fits == "false"
    assert text in sample
    assert "the limit is 102.4 MiB" in text
    page.screenshot("plan-line-red")
    assert page.unexpected_messages() == []
