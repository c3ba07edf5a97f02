"""The memory nodes show their table and their image on the page, and save nothing of them."""

from typing import Any

from small_checkpoint import SplitFiles

from .conftest import in_both_renderers, in_chinese

# what an earlier graph's panel was: the Vue renderer takes it away later
GONE = """async () => {
  for (let waited = 0; waited < 5000 && document.querySelector('.qwen-lowvram-memory'); waited += 50)
    await new Promise((done) => setTimeout(done, 50));
}"""
ADD = """async (files) => {
  const graph = window.app.graph;
  graph.clear();
  await (GONE)();
  const node = window.LiteGraph.createNode('QwenLowVRAMMemoryPlan');
  graph.add(node);
  for (const [name, value] of Object.entries(files)) node.widgets.find((w) => w.name === name).value = value;
  return node.id;
}""".replace("GONE", GONE)
# a report, as the server tells of a run of that node
REPORT = """async (text) => {
  const graph = window.app.graph;
  graph.clear();
  await (GONE)();
  const node = window.LiteGraph.createNode('QwenLowVRAMMemoryReport');
  graph.add(node);
  await new Promise((done) => setTimeout(done, 300));
  const ids = { node: String(node.id), display_node: String(node.id), prompt_id: 'x' };
  window.comfyAPI.api.api.dispatchCustomEvent('executed', { ...ids, output: { text: [text] } });
  await new Promise((done) => setTimeout(done, 500));
}""".replace("GONE", GONE)
# what of the panel cannot be seen without scrolling, in px
HIDDEN = """() => {
  const panel = document.querySelector('.qwen-lowvram-memory');
  return [panel.scrollWidth - panel.clientWidth, panel.scrollHeight - panel.clientHeight];
}"""
SHOWN = "() => document.querySelector('.qwen-lowvram-memory').innerText"


@in_chinese
def test_a_chinese_page_tells_the_plan_in_chinese(page: Any, split_files: dict[str, SplitFiles]) -> None:
    names = split_files["bf16"]
    page.evaluate(ADD, {"transformer": names.transformer, "text_encoder": names.text_encoder, "vae": names.vae})
    assert page.evaluate("() => new Promise((done) => setTimeout(done, 500))") is None
    assert page.evaluate(SHOWN) == "运行工作流后显示计划。"
    assert page.run()["status"] == "success"
    assert page.evaluate("() => new Promise((done) => setTimeout(done, 500))") is None
    shown = page.evaluate(SHOWN)
    assert shown.startswith("内存计划：1328x1328，批次 1，有引导")
    assert "格式" in shown
    assert "常驻的权重" in shown  # what the chart's words mean
    assert page.evaluate(HIDDEN) == [0, 0]
    page.screenshot("memory-plan-chinese")
    assert page.unexpected_messages() == []


@in_both_renderers
def test_the_plan_is_shown_on_its_node(page: Any, split_files: dict[str, SplitFiles]) -> None:
    names = split_files["bf16"]
    files = {"transformer": names.transformer, "text_encoder": names.text_encoder, "vae": names.vae}
    node = page.evaluate(ADD, files)
    assert page.evaluate("() => new Promise((done) => setTimeout(done, 500))") is None
    assert page.evaluate(SHOWN) == "Run the graph to see the plan."
    assert page.run()["status"] == "success"
    shown = page.evaluate(SHOWN)
    assert shown.startswith("Memory plan: 1328x1328")
    assert "another seed" in shown
    assert page.evaluate("() => new Promise((done) => setTimeout(done, 500))") is None
    assert page.evaluate(HIDDEN) == [0, 0]  # every row and column is there to be read
    inputs = page.prompt()[str(node)]["inputs"]
    assert inputs["transformer"] == names.transformer
    assert "qwen_lowvram_memory" not in inputs
    (saved,) = page.serialize()["nodes"]
    assert len(saved["widgets_values"]) == len(inputs)
    page.screenshot("memory-plan")
    assert page.unexpected_messages() == []


@in_both_renderers
def test_all_of_a_report_is_seen(page: Any) -> None:
    stages = ("encode", "load", "modulation", "sampling", "decode")
    rows = [f"{stage:<12}" + "  ".join(f"{number:10.2f}" for number in range(9)) for stage in stages]
    text = "\n".join(["Memory report", "", *rows, "", "waited 1.25 s for the disk and 0.75 s for the bus" * 3])
    page.evaluate(REPORT, text)
    assert page.evaluate(SHOWN) == text
    assert page.evaluate(HIDDEN) == [0, 0]
    page.screenshot("memory-report")
    assert page.unexpected_messages() == []
