"""The loader says what the next run would take, while the graph is being changed; in both renderers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import full_size
import pytest
import torch
from devtools.workflow import set_widgets
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint
from qwenimage_lowvram.engine.lora.lora_file import LoraFile
from run_facts import FACTS, GIB
from small_checkpoint import SplitFiles
from small_vae_21 import random_vae_21, write_file

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

# a line that says something else than `before`
CHANGED = """async (before) => {
  const panel = () => document.querySelector('.qwen-lowvram-plan-line').textContent;
  for (let waited = 0; waited < 60000 && panel() === before; waited += 100)
    await new Promise((done) => setTimeout(done, 100));
  return panel();
}"""
ADD_LORA = """(file) => {
  const { graph } = window.app;
  const [load, sample] = ['QwenLowVRAMLoader', 'QwenLowVRAMSample'].map(
    (type) => graph.nodes.find((node) => node.type === type));
  const lora = window.LiteGraph.createNode('QwenLowVRAMLoadLora');
  graph.add(lora);
  lora.widgets.find((widget) => widget.name === 'lora_name').value = file;
  load.connect(0, lora, 0);
  lora.connect(0, sample, sample.inputs.findIndex(({ name }) => name === 'model'));
  window.comfyAPI.api.api.dispatchCustomEvent('graphChanged');
}"""

LINK_VAE = """(file) => {
  const { graph } = window.app;
  const [load, decode] = ['QwenLowVRAMLoader', 'QwenLowVRAMDecode'].map(
    (type) => graph.nodes.find((node) => node.type === type));
  const other = window.LiteGraph.createNode('VAELoader');
  if (file) {
    graph.add(other);
    other.widgets.find((widget) => widget.name === 'vae_name').value = file;
  }
  const source = file ? other : load;
  source.connect(file ? 0 : 2, decode, decode.inputs.findIndex(({ name }) => name === 'vae'));
  window.comfyAPI.api.api.dispatchCustomEvent('graphChanged');
}"""
ON_DECODE = """async (wanted) => {
  const decode = () => window.app.graph.nodes.find((node) => node.type === 'QwenLowVRAMDecode');
  const text = () => decode().widgets.find(({ name }) => name === 'qwen_lowvram_line')?.element.textContent ?? '';
  for (let waited = 0; waited < 60000 && !text() === wanted; waited += 100)
    await new Promise((done) => setTimeout(done, 100));
  return text();
}"""

RUN = {
    "prompt_id": "p", "stage": "done", "step": 20, "steps": 20, "share": 1.0, "seconds": 60.0, "vram_bytes": GIB,
    "peak_vram_bytes": GIB, "ram_bytes": GIB, "peak_ram_bytes": GIB, "held_bytes": GIB, "seconds_per_step": 3.0,
    "previews": True, "facts": FACTS,
}  # fmt: skip
DONE = """(event) => {
  const node = window.app.graph.nodes.find(({ type }) => type === 'QwenLowVRAMSample').id;
  window.comfyAPI.api.api.dispatchCustomEvent('qwen_lowvram.progress', { ...event, node: String(node) });
}"""
NOTE = "() => document.querySelector('[data-part=note]').textContent"
DECODE_PX = """() => window.app.graph.nodes.find((node) => node.type === 'QwenLowVRAMDecode').size[1]"""


# the model of Sample linked to nothing, and the line when it says nothing
UNLINK = """async () => {
  const sample = window.app.graph.nodes.find(({ type }) => type === 'QwenLowVRAMSample');
  sample.disconnectInput(sample.inputs.findIndex(({ name }) => name === 'model'));
  window.comfyAPI.api.api.dispatchCustomEvent('graphChanged');
}"""
SAYS_NOTHING = """async () => {
  const texts = () => ['.qwen-lowvram-plan-line', '[data-part=note]'].map(
    (part) => document.querySelector(part).textContent);
  for (let waited = 0; waited < 20000 && texts().join(''); waited += 100)
    await new Promise((done) => setTimeout(done, 100));
  return texts();
}"""
# the next question about the plan is answered with an error, and those after it as ever
FAIL_ONCE = """() => {
  const { api } = window.comfyAPI.api;
  const real = api.fetchApi;
  api.fetchApi = function (path, ...options) {
    if (!path.endsWith('/qwen_lowvram/plan')) return real.call(api, path, ...options);
    api.fetchApi = real;
    return Promise.resolve(new Response('', { status: 500 }));
  };
}"""
CHANGE = "() => window.comfyAPI.api.api.dispatchCustomEvent('graphChanged')"
# of the note's letters on the panel
CONTRAST = """async (palette) => {
  await window.app.extensionManager.setting.set('Comfy.ColorPalette', palette);
  await new Promise((done) => setTimeout(done, 500));
  const pen = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const light = (css) => {
    pen.fillStyle = css;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
      .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0.05);
  };
  const panel = document.querySelector('.qwen-lowvram-panel');
  const note = panel.querySelector('[data-part=note]');
  const both = [getComputedStyle(panel).backgroundColor, getComputedStyle(note).color];
  const [dark, bright] = both.map(light).sort((a, b) => a - b);
  return bright / dark;
}"""


@pytest.fixture(scope="module")
def real_size(models_dir: Path) -> Iterator[dict[str, str]]:
    """Files of the real model's headers, and of nothing else, by the loader's inputs; and a LoRA."""
    fp8 = torch.float8_e4m3fn
    transformer = full_size.transformer_checkpoint(fp8)
    written: dict[str, tuple[str, Checkpoint | LoraFile]] = {
        "transformer": ("diffusion_models", transformer),
        "text_encoder": ("text_encoders", full_size.text_encoder_checkpoint(fp8)),
        "vae": ("vae", full_size.vae_checkpoint()),
        "lora": ("loras", full_size.lightning_lora({name: e.shape for name, e in transformer.tensors.items()})),
    }
    (models_dir / "loras").mkdir(exist_ok=True)
    files = {
        part: full_size.write_header(checkpoint, models_dir / folder / f"real_size_{part}.safetensors")
        for part, (folder, checkpoint) in written.items()
    }
    yield {part: file.name for part, file in files.items()}
    for file in files.values():
        file.unlink()


@pytest.fixture
def graph(object_info: dict[str, Any], split_files: dict[str, SplitFiles]) -> dict[str, Any]:
    """The first workflow, with files that are there."""
    names = split_files["fp8"]
    files = {"transformer": names.transformer, "text_encoder": names.text_encoder, "vae": names.vae}
    return set_widgets(json.loads(WORKFLOW.read_text(encoding="utf-8")), object_info, "QwenLowVRAMLoader", **files)


def test_of_a_model_of_the_real_size_it_has_the_numbers_of_60_blocks_and_of_a_lora(
    page: Any, object_info: dict[str, Any], real_size: dict[str, str]
) -> None:
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    files = {part: name for part, name in real_size.items() if part != "lora"}
    page.load(set_widgets(graph, object_info, "QwenLowVRAMLoader", **files))
    fits, plain, _ = page.evaluate(LINE, "true")
    assert fits == "true"
    found = re.match(r"fp8\w*, (\d+) of 60 blocks on the card, (2\.\d+) of 3\.00 GiB, ", plain)
    assert found, plain
    page.evaluate(ADD_LORA, real_size["lora"])
    with_lora = page.evaluate(CHANGED, plain)
    changed = re.match(r"fp8\w*, (\d+) of 60 blocks on the card, (2\.\d+|3\.00) of 3\.00 GiB, ", with_lora)
    assert changed, with_lora
    assert changed.groups() != found.groups()
    assert "not counted" not in with_lora
    page.screenshot("plan-line-real-size")
    assert page.unexpected_messages() == []


def test_the_line_follows_the_graph_and_turns_red_where_it_does_not_fit(page: Any, graph: dict[str, Any]) -> None:
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
    memory = "() => getComputedStyle(document.querySelector('[data-part=memory]')).display"
    assert page.evaluate(memory) == "none"  # there is room for the whole message
    page.screenshot("plan-line-red")
    assert [page.evaluate(CONTRAST, palette) >= 4.5 for palette in ("light", "dark")] == [True, True]
    assert page.unexpected_messages() == []


def test_the_line_is_there_on_new_nodes_and_after_a_failed_answer_and_goes_where_nothing_samples(
    page: Any, graph: dict[str, Any]
) -> None:
    page.load(graph)
    text = page.evaluate(LINE, "true")[1]
    page.load(graph)  # as undo does: other nodes, and the same question
    assert page.evaluate(LINE, "true")[1].split(", about")[0] == text.split(", about")[0]
    page.evaluate(FAIL_ONCE)
    page.evaluate(SET, ["EmptySD3LatentImage", "width", 256])
    assert page.evaluate(SAYS_NOTHING) == ["", ""]  # not what was true before
    page.evaluate(CHANGE)
    assert "blocks on the card" in page.evaluate(LINE, "true")[1]
    page.evaluate(UNLINK)
    assert page.evaluate(SAYS_NOTHING) == ["", ""]
    assert page.unexpected_messages() == []


def test_a_refusal_gives_way_to_what_the_last_run_said(page: Any, graph: dict[str, Any]) -> None:
    page.load(graph)
    assert page.evaluate(LINE, "true")[0] == "true"
    page.evaluate(DONE, RUN)
    told = page.evaluate(NOTE)
    assert "blocks stay" in told
    page.evaluate(SET, ["QwenLowVRAMLoader", "vram_limit_gb", 0.001])
    assert page.evaluate(LINE, "false")[1] == page.evaluate(NOTE) != told
    page.evaluate(SET, ["QwenLowVRAMLoader", "vram_limit_gb", 3.0])
    assert page.evaluate(LINE, "true")[0] == "true"
    assert page.evaluate(NOTE) == told


def test_another_models_vae_is_said_on_decode_until_it_is_gone(
    page: Any, graph: dict[str, Any], models_dir: Path
) -> None:
    foreign = write_file(models_dir / "vae" / "of-2.1.safetensors", random_vae_21())
    page.load(graph)
    height = page.evaluate(DECODE_PX)
    try:
        page.evaluate(LINK_VAE, foreign.name)
        assert page.evaluate(ON_DECODE, True).startswith("'Decode (tiled)' has the VAE of another model.")
        assert page.evaluate(LINE, "false")[1].startswith("'Decode (tiled)' has the VAE of another model.")
        assert page.evaluate(DECODE_PX) >= height + 60
        page.screenshot("decode-wrong")
        page.evaluate(LINK_VAE, "")
        assert page.evaluate(ON_DECODE, False) == ""
        page.screenshot("decode-right-again")
        assert page.evaluate(DECODE_PX) < height + 16
        assert page.evaluate(LINE, "true")[0] == "true"
    finally:
        foreign.unlink()
