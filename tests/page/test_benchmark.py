"""The Benchmark node shows what it measured, and its buttons copy it; nothing of either is saved."""

from typing import Any

from .conftest import in_both_renderers, in_chinese

ADD = """() => {
  const graph = window.app.graph;
  graph.clear();
  const node = window.LiteGraph.createNode('QwenLowVRAMBenchmark');
  graph.add(node);
  return node.id;
}"""
# as the server tells of a run of that node
SHOW = """([id, text]) => {
  const { api } = window.comfyAPI.api;
  api.dispatchCustomEvent('executed', { node: id, display_node: id, prompt_id: 'x', output: { text } });
}"""
LINE = "Card X 8.00 GiB | bus 12.1 GB/s"
NUMBERS = '{\n "version": 1,\n "line": "Card X 8.00 GiB | bus 12.1 GB/s"\n}'
SHOWN = "() => document.querySelector('.qwen-lowvram-benchmark').textContent"
BUTTONS = "() => [...document.querySelectorAll('.qwen-lowvram-copy button')].map((b) => b.textContent)"
# what a press puts into the clipboard, or selects where there is none; and what the button says then
PRESS = """async ({what, clipboard}) => {
  let copied = null;
  const own = clipboard ? { writeText: async (text) => { copied = text; } } : undefined;
  Object.defineProperty(navigator, 'clipboard', { value: own, configurable: true });
  const button = document.querySelector(`.qwen-lowvram-copy button[data-copy=${what}]`);
  button.click();
  await new Promise((done) => setTimeout(done, 100));
  return [clipboard ? copied : String(getSelection()), button.textContent];
}"""
WAIT = "() => new Promise((done) => setTimeout(done, 500))"


@in_both_renderers
def test_what_was_measured_is_shown_and_copied(page: Any) -> None:
    node = page.evaluate(ADD)
    page.evaluate(WAIT)
    assert page.evaluate(SHOWN) == "Run the graph to measure this machine."
    assert page.evaluate(BUTTONS) == ["Copy line", "Copy JSON"]
    assert page.evaluate(PRESS, {"what": "line", "clipboard": True}) == [None, "Copy line"]  # there is nothing yet
    page.evaluate(SHOW, [str(node), [LINE, "", NUMBERS]])
    assert page.evaluate(SHOWN) == f"{LINE}\n\n{NUMBERS}"
    assert page.evaluate(PRESS, {"what": "line", "clipboard": True}) == [LINE, "Copied"]
    assert page.evaluate(PRESS, {"what": "json", "clipboard": True}) == [NUMBERS, "Copied"]
    page.evaluate("() => new Promise((done) => setTimeout(done, 2100))")
    assert page.evaluate(BUTTONS) == ["Copy line", "Copy JSON"]
    selected, said = page.evaluate(PRESS, {"what": "line", "clipboard": False})
    assert (selected.strip(), said) == (LINE, "Press Ctrl+C")
    page.screenshot("benchmark")
    (inputs,) = (each["inputs"] for each in page.prompt().values())
    assert inputs == {"width": 1328, "height": 1328}
    (saved,) = page.serialize()["nodes"]
    assert saved["widgets_values"] == [1328, 1328]
    assert page.unexpected_messages() == []


@in_chinese
def test_the_buttons_speak_chinese(page: Any) -> None:
    page.evaluate(ADD)
    page.evaluate(WAIT)
    assert page.evaluate(SHOWN) == "运行工作流后显示测量结果。"
    assert page.evaluate(BUTTONS) == ["复制文本行", "复制 JSON"]
    page.screenshot("benchmark-zh")
    assert page.unexpected_messages() == []
