"""The Quantized Weights node shows its list, on the page as in the output, and its buttons clear; nothing of either is
saved."""

from pathlib import Path
from typing import Any

import pytest

from .conftest import in_both_renderers, in_chinese

ADD = """() => {
  const graph = window.app.graph;
  graph.clear();
  const node = window.LiteGraph.createNode('QwenLowVRAMWeightCache');
  graph.add(node);
  return node.id;
}"""
BUTTONS = "() => [...document.querySelectorAll('.qwen-lowvram-clear button')].map((b) => b.textContent)"
# a person gets there with Tab, and presses Enter: the browser makes a click of it
PRESS = """(what) => {
  const button = document.querySelector(`.qwen-lowvram-clear button[data-clear=${what}]`);
  button.focus();
  const focused = document.activeElement === button && button.tabIndex === 0;
  button.click();
  return focused;
}"""
CHOICE = """() => {
  const { value, options } = window.app.graph.nodes[0].widgets.find(({ name }) => name === 'action');
  return [value, options.getOptionLabel(value)];
}"""
SETTLED = """() => new Promise((done) => {
  const look = () => document.querySelector('.qwen-lowvram-clear [aria-disabled]') ? setTimeout(look, 50) : done(true);
  look();
})"""
SHOWN = "() => document.querySelector('.qwen-lowvram-weights').innerText"


@in_both_renderers
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


@in_both_renderers
@pytest.mark.parametrize("what", ["unused", "all"])
def test_a_button_clears_and_shows_what_is_left(what: str, page: Any, models_dir: Path) -> None:
    page.evaluate(ADD)
    page.evaluate("() => new Promise((done) => setTimeout(done, 500))")
    assert page.evaluate(BUTTONS) == ["Clear unused", "Clear all weights", "Clear prompts"]
    folder = models_dir / "qwen_lowvram"
    folder.mkdir(exist_ok=True)
    damaged, odd = (folder / f"{name}.nf4.0123456789abcdef.safetensors" for name in ("model", "odd"))
    damaged.write_bytes(b"")
    odd.mkdir()
    assert page.evaluate(PRESS, what) is True
    assert page.evaluate(SETTLED) is True
    lines = page.evaluate(SHOWN).splitlines()
    assert lines[0] == f"{folder}: nothing"
    assert "removed: 1 file, 0.00 GB" in lines
    assert any(line.endswith("not this pack's file, left alone") for line in lines)
    assert [path.name for path in folder.glob("*.safetensors")] == [odd.name]
    odd.rmdir()
    (saved,) = page.serialize()["nodes"]
    assert saved["widgets_values"] == ["show"]
    (inputs,) = (node["inputs"] for node in page.prompt().values())
    assert inputs == {"action": "show"}
    page.screenshot(f"weight-cache-{what}")
    assert page.unexpected_messages() == []


@in_both_renderers
def test_a_graph_with_an_old_value_that_clears_still_opens_and_clears_nothing(page: Any, models_dir: Path) -> None:
    page.evaluate(ADD)
    graph = page.serialize()
    graph["nodes"][0]["widgets_values"] = ["clear all"]
    file = models_dir / "qwen_lowvram" / "old.nf4.0123456789abcdef.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"")
    page.load(graph)
    assert page.run()["status"] == "success"
    assert "Nothing was cleared" in page.evaluate(SHOWN)
    assert file.exists()
    file.unlink()
    assert page.unexpected_messages() == []


@in_chinese
def test_the_node_speaks_chinese(page: Any) -> None:
    page.evaluate(ADD)
    page.evaluate("() => new Promise((done) => setTimeout(done, 500))")
    assert page.evaluate(BUTTONS) == ["清理未使用的权重", "清理全部权重", "清理提示词"]
    assert page.run()["status"] == "success"
    page.evaluate("() => new Promise((done) => setTimeout(done, 500))")
    lines = page.evaluate(SHOWN).splitlines()
    assert lines[0].endswith("：没有文件")
    assert lines[1].startswith("提示词：")
    assert page.evaluate(PRESS, "prompts") is True
    assert page.evaluate(SETTLED) is True
    assert page.evaluate(SHOWN).splitlines()[-1].startswith("已删除提示词：")
    # the choice has a Chinese label, and its own value
    assert page.evaluate(CHOICE) == ["show", "显示（show）"]
    (inputs,) = (node["inputs"] for node in page.prompt().values())
    assert inputs == {"action": "show"}
    page.screenshot("weight-cache-zh")
    assert page.unexpected_messages() == []
