"""The shipped graphs in the real page: they come back as they are, run to their image, and the panel follows."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from devtools.client import ComfyClient
from devtools.workflow import set_widgets, to_prompt
from run_facts import FACTS, GIB

from .conftest import HINT, in_both_renderers, in_chinese_in_both_renderers, in_every_page

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
LOOKED_AT = [path for path in WORKFLOWS if path.name[:2] in ("01", "13", "20", "27")]  # by a person, as pictures
SAMPLE, LATENT = "QwenLowVRAMSample", "EmptySD3LatentImage"
FILES = {
    "transformer": "qwen_image_fp8_e4m3fn.safetensors",
    "text_encoder": "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "vae": "qwen_image_vae.safetensors",
}
# what the server sends while a card with memory of its own works; the keys are compared with a real event's
EVENT: dict[str, Any] = {
    "node": "4", "prompt_id": "p", "workflow_id": None, "previews": True,
    "stage": "sampling", "step": 7, "steps": 20, "block": 30, "blocks": 60, "share": 0.325,
    "vram_bytes": 2 * GIB, "peak_vram_bytes": 3 * GIB, "ram_bytes": GIB, "peak_ram_bytes": GIB, "held_bytes": 6 * GIB,
    "seconds": 72.0, "seconds_per_step": 12.345, "seconds_left": 130.0, "facts": FACTS,
}  # fmt: skip
PLAN = "Memory plan for 1024x1024, 2 branches: 26 of 60 blocks resident, 34 streamed"

SEND = "(event) => window.comfyAPI.api.api.dispatchCustomEvent('qwen_lowvram.progress', event)"
# the text of each panel by node id, wherever its graph is
PANELS = """() => {
  const found = {};
  const visit = (graph, prefix) => {
    for (const node of graph.nodes) {
      const widget = node.widgets?.find((widget) => widget.name === 'qwen_lowvram_progress');
      if (widget) found[prefix + node.id] = [...widget.element.querySelectorAll('*')].filter(
        (part) => !part.children.length && part.textContent && !part.matches('button, [data-part=spoken]')
      ).map((part) => part.textContent);
      if (node.subgraph) visit(node.subgraph, `${prefix}${node.id}:`);
    }
  };
  visit(window.app.rootGraph, '');
  return found;
}"""
# the extension listens first, so the panel has changed by then
RECORD = f"""() => {{
  const seen = (document.qwenSeen = []);
  const listen = ({{ detail }}) => seen.push({{ event: detail, panels: ({PANELS})() }});
  window.comfyAPI.api.api.addEventListener('qwen_lowvram.progress', listen);
}}"""
BOXES = """() => window.app.graph.nodes.map(
  (node) => [node.id, node.type, [...node.pos], [...node.size], node.computeSize()[1]])"""
FRAMES = "() => window.app.graph.groups.map((group) => [group.title, [...group.pos, ...group.size]])"
# what a run leaves on nodes: a sentence on each, a preview on Sample and images where images are shown
TOLD = "A sentence that a node tells while it runs, with what was done, what was not, and what to do about it. " * 4
AS_AFTER_A_RUN = """(text) => {
  const api = window.comfyAPI.api.api;
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [512, 512];
  const shown = { images: [{ filename: 'example.png', subfolder: '', type: 'input' }] };
  return new Promise((done) => canvas.toBlob((blob) => {
    for (const node of window.app.graph.nodes) {
      if (node.type === 'MarkdownNote') continue;
      const id = String(node.id);
      api.dispatchCustomEvent('progress_text', { nodeId: id, text });
      if (node.type === 'SaveImage') {
        api.dispatchCustomEvent('executed', { node: id, display_node: id, prompt_id: 'x', output: shown });
      }
      if (node.type === 'QwenLowVRAMSample') {
        const ids = { nodeId: id, displayNodeId: id, parentNodeId: id, realNodeId: id };
        api.dispatchCustomEvent('b_preview_with_metadata', { blob, jobId: 'x', ...ids });
      }
    }
    done(blob.size);
  }));
}"""
PAUSE = "(ms) => new Promise((done) => setTimeout(done, ms))"


@pytest.fixture(scope="module")
def small(object_info: dict[str, Any], split_files: dict[str, Any]) -> Any:
    """The 4 GB workflow on the small checkpoint: `small(width=128, seed=1)`, further values go to Sample."""
    names = split_files["fp8"]

    def adapt(width: int = 128, height: int = 128, **values: Any) -> dict[str, Any]:
        text = WORKFLOWS[0].read_text(encoding="utf-8")
        for part, name in FILES.items():
            text = text.replace(name, getattr(names, part))
        graph = set_widgets(json.loads(text), object_info, LATENT, width=width, height=height)
        return set_widgets(graph, object_info, SAMPLE, **{"steps": 4, **values})

    return adapt


def as_saved(graph: dict[str, Any], vue: bool) -> dict[str, Any]:
    """The graph without the view, and without what the page works out inside subgraphs: counters, the order, where
    their ends stand, names in its language. Vue nodes also measure their own sizes."""
    saved = copy.deepcopy({key: value for key, value in graph.items() if key != "extra"})
    for node in saved["nodes"] if vue else ():
        del node["size"]
    for inside in (saved.get("definitions") or {}).get("subgraphs", ()):
        del inside["state"]
        ends = [*inside["inputs"], *inside["outputs"]]
        for node in inside["nodes"]:
            del node["order"]
            ends += [*node["inputs"], *node["outputs"]]
        for entry in ends:
            entry.pop("pos", None)
            entry.pop("localized_name", None)
    return saved


def lines_of(page: Any, node: str = "4") -> list[str]:
    return page.evaluate(PANELS)[node]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
@in_both_renderers
def test_the_page_shows_saves_and_sends_a_shipped_graph_as_it_is(
    page: Any, vue: bool, object_info: dict[str, Any], file: Path
) -> None:
    graph = json.loads(file.read_text(encoding="utf-8"))
    page.load(graph)
    assert as_saved(page.serialize(), vue) == as_saved(graph, vue)
    prompt = {key: {name: node[name] for name in ("class_type", "inputs")} for key, node in page.prompt().items()}
    assert prompt == to_prompt(graph, object_info)
    assert_apart(page)
    for _, kind, _, (_, height), needed in page.evaluate(BOXES):
        assert height >= needed, f"{kind} is cut off."
    page.evaluate(AS_AFTER_A_RUN, TOLD)
    page.evaluate(PAUSE, 1200)
    assert_apart(page)
    if file in LOOKED_AT:
        page.screenshot(f"after-a-run-{'vue' if vue else 'classic'}-{file.stem[:2]}")


def assert_apart(page: Any) -> None:
    """No node lies over another, and each stands in the frame of one step."""
    boxes, frames = page.evaluate(BOXES), page.evaluate(FRAMES)
    for node, kind, (left, top), (width, height), _ in boxes:
        for other, of, (x, y), (w, h), _ in boxes:
            apart = left + width <= x or x + w <= left or top + height <= y - 30 or y + h <= top - 30  # 30: the title
            assert apart or node == other, f"{kind} lies over {of}."
        around = [title for title, (x, y, w, h) in frames if x <= left and left + width <= x + w
                  and y <= top - 30 and top + height <= y + h]  # fmt: skip
        assert len(around) == (kind != "MarkdownNote"), f"{kind} stands in {around}."


@in_both_renderers
def test_the_4_gb_workflow_runs_in_the_page_to_its_image(page: Any, small: Any, client: ComfyClient, vue: bool) -> None:
    client.free()  # of what the first page has loaded, and encoded
    client.post("/qwen_lowvram/clear", {"clear": "prompts"})
    # a size of its own for each: the second run would know the first one's timestep table
    page.load(small(width=160 if vue else 128, seed=11), "Low VRAM 4 GB - Qwen-Image")
    page.evaluate(RECORD)
    assert page.run()["status"] == "success"
    page.evaluate(PAUSE, 1000)
    seen = page.evaluate("() => document.qwenSeen")
    of_run = [event for event in seen if event["event"]["node"] == "4"]
    stages = list(dict.fromkeys(event["event"]["stage"] for event in of_run))
    assert stages == ["preparing", "loading", "modulation", "sampling", "done"]
    sampled = [event["event"] for event in of_run if event["event"]["stage"] == "sampling"]
    assert all(set(event) - {"plan"} == set(EVENT) and set(event["facts"]) == set(FACTS) for event in sampled)
    assert len({event["event"]["prompt_id"] for event in seen}) == 1
    assert {event["event"]["workflow_id"] for event in seen} == {page.evaluate("() => window.app.rootGraph.id")}
    shown = {event["event"]["stage"]: event["panels"]["4"] for event in of_run}
    assert re.fullmatch(r"Loading what stays on the card, block \d+/\d+", shown["loading"][0])
    assert re.fullmatch(r"Reading weights once \(not for the next seed\): block \d+/\d+", shown["modulation"][0])
    assert re.fullmatch(r"step \d/4 · \d:\d\d · about \d:\d\d left", shown["sampling"][0])
    assert re.fullmatch(r"All \d blocks stay in RAM; bound by [a-z ]+\.", shown["sampling"][-1])

    waited = [event for event in seen if event["event"]["stage"] == "encoding" and event["event"]["total"]]
    assert all(event["panels"]["4"][0].startswith("Waiting: encoding prompts, layer ") for event in waited)
    assert re.fullmatch(r"Prompts encoded in \d:\d\d", line_of(page, "2"))
    assert re.fullmatch(r"Decoded in \d:\d\d", line_of(page, "5"))
    assert re.fullmatch(r"Model opened in \d:\d\d", line_of(page, "1"))

    lines = lines_of(page)
    assert re.fullmatch(r"Done: 4 steps in \d:\d\d", lines[0])
    assert re.fullmatch(r"[\d.]+ s/step", lines[1])
    assert lines[2:4] == ["VRAM", "none of its own: the device uses RAM"]
    assert re.fullmatch(r"\d+\.\d\d, peak \d+\.\d\d of \d+\.\d\d GiB", lines[5])
    assert re.fullmatch(r"\d\.\d\d GiB read from the file\. \d of \d blocks stay for the next run\.", lines[6])

    image = page.evaluate("() => window.app.nodeOutputs['6'].images[0]")
    assert client.image(image).startswith(b"\x89PNG")
    assert page.screenshot(f"workflow-{'vue' if vue else 'classic'}").stat().st_size > 10_000
    assert page.unexpected_messages() == []


LINE = """(id) => window.app.graph.getNodeById(id).widgets.find((w) => w.name === 'qwen_lowvram_line')
  .element.innerText"""


def line_of(page: Any, node: str) -> str:
    """What the line on a node without a panel says."""
    return page.evaluate(LINE, node)


@in_both_renderers
def test_the_panel_shows_memory_against_its_limit(page: Any, small: Any, vue: bool) -> None:
    page.load(small())
    page.evaluate(SEND, EVENT)
    lines = lines_of(page)
    assert lines[:2] == ["step 7/20 · 1:12 · about 2:10 left", "12 s/step"]
    assert lines[2:4] == ["VRAM", "2.00, peak 3.00 of 4.00 GiB"]
    parts = "document.querySelectorAll('.qwen-lowvram-panel :is([data-part=bar], [data-part=fill])')"
    widths = page.evaluate(f"() => Array.from({parts}, (part) => part.style.width)")
    assert widths[:2] == ["32.5%", "50%"]
    sentence = "26 of 60 blocks stay on the card, the rest pass through once per step; bound by computing."
    assert lines[-1] == sentence
    page.screenshot(f"panel-{'vue' if vue else 'classic'}")

    page.evaluate(SEND, EVENT | {"facts": FACTS | {"ram_limit_bytes": 8 * GIB}})
    assert lines_of(page)[5] == "6.00 of 8.00 GiB for the model"


# of each element of a panel or line that holds text: is all of it seen?
CUT = """() => [
  ...document.querySelectorAll('.qwen-lowvram-panel, .qwen-lowvram-panel *, .qwen-lowvram-line')
].filter((part) =>
  part.dataset.part !== 'spoken' && part.offsetParent && part.textContent &&
  (part.matches('.qwen-lowvram-panel') || !part.querySelector('[data-part]')) &&
  (part.scrollWidth > part.clientWidth + 1 || part.scrollHeight > part.clientHeight + 1)
).map((part) => part.textContent)"""


@in_every_page
def test_nothing_in_the_panel_is_cut_off_in_any_stage(page: Any, vue: bool, language: str) -> None:
    page.evaluate("""() => {
      window.app.graph.clear();
      const node = window.LiteGraph.createNode('QwenLowVRAMSample');
      node.pos = [100, 100];
      window.app.graph.add(node);
      node.id = 4;
      window.app.graph._nodes_by_id[4] = node;
    }""")
    page.evaluate(PAUSE, 500)
    long = {"step": 117, "steps": 200, "seconds": 5025.0, "seconds_left": 12345.0, "seconds_per_step": 123.0}
    counted = {"done": 28, "total": 60, "share": 0.5}
    told = [
        EVENT,
        EVENT | long,
        EVENT | {"stage": "loading", **counted},
        EVENT | {"stage": "modulation", **counted},
        EVENT | {"stage": "done"},
        EVENT | {"facts": FACTS | {"bound": "decoding", "ram_limit_bytes": 12 * GIB}},
        {**EVENT, "node": "1", "prompt_id": "q", "stage": "encoding", "done": 4, "total": 28},
    ]
    for number, event in enumerate(told):
        page.evaluate(SEND, event)
        page.evaluate(PAUSE, 100)
        assert page.evaluate(CUT) == [], event["stage"]
        if language == "zh":
            text = page.evaluate("() => document.querySelector('.qwen-lowvram-panel').innerText")
            assert not re.search("[A-Za-z]{2,}", text.replace("GiB", "")), text
        page.screenshot(f"stage-{number}-{language}-{'vue' if vue else 'classic'}")


# as on a page of another machine without https; the focus is where it was
COPY_WITHOUT_A_CLIPBOARD = """async () => {
  const before = document.activeElement;
  Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true });
  const copy = document.querySelector('dialog.qwen-lowvram-view button');
  copy.click();
  await new Promise((done) => setTimeout(done, 100));
  delete navigator.clipboard;
  const told = [copy.textContent, String(getSelection())];
  getSelection().removeAllRanges();
  before.focus();
  return told;
}"""


@in_both_renderers
def test_the_whole_plan_is_read_in_a_view_of_its_own_by_keyboard(page: Any, small: Any, vue: bool) -> None:
    page.load(small())
    button = "document.querySelector('.qwen-lowvram-panel [data-part=details]')"
    assert page.evaluate(f"() => getComputedStyle({button}).visibility") == "hidden"
    assert "Nothing has run yet" in lines_of(page)
    page.evaluate(SEND, EVENT | {"plan": PLAN})
    page.evaluate(f"() => {{ {button}.focus(); }}")
    page.evaluate(f"() => document.activeElement === {button} && document.activeElement.click()")
    view = page.evaluate("() => document.querySelector('dialog.qwen-lowvram-view[open]').innerText")
    assert "Plan of this run" in view
    assert re.search(r"Blocks that stay on the card\s+26 of 60", view)
    assert re.search(r"A step\s+12 s \(forecast\)", view)
    assert PLAN in view
    assert page.evaluate("() => document.querySelector('dialog').clientWidth") >= 900
    page.screenshot(f"view-{'vue' if vue else 'classic'}")
    button, selected = page.evaluate(COPY_WITHOUT_A_CLIPBOARD)
    assert button == "Press Ctrl+C"
    assert PLAN in selected
    page.evaluate("() => document.activeElement.click()")  # the button that closes it has the focus
    assert page.evaluate("() => document.querySelector('dialog.qwen-lowvram-view')") is None


@in_both_renderers
def test_the_panel_can_be_read_by_everybody(page: Any, small: Any) -> None:
    page.load(small())
    page.evaluate(SEND, EVENT)
    bar = page.evaluate("""() => {
      const bar = document.querySelector('.qwen-lowvram-panel [role=progressbar]');
      return [bar.getAttribute('aria-valuenow'), bar.getAttribute('aria-valuetext')];
    }""")
    assert bar == ["33", "step 7/20 · 1:12 · about 2:10 left"]
    spoken = "() => document.querySelector('.qwen-lowvram-panel [role=status]').textContent"
    assert page.evaluate(spoken) == "step 7/20 · 1:12 · about 2:10 left"
    page.evaluate(SEND, EVENT | {"step": 8})
    assert page.evaluate(spoken).startswith("step 7/20")  # a stage is said once, not four times a second
    for palette in ("light", "dark"):
        page.evaluate("(id) => window.app.extensionManager.setting.set('Comfy.ColorPalette', id)", palette)
        page.evaluate(PAUSE, 500)
        contrast = page.evaluate(CONTRAST)
        assert min(contrast) >= 4.5, (palette, contrast)
        page.screenshot(f"palette-{palette}")


CONTRAST = """() => {
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const parse = (css) => css.match(/[\\d.]+/g).map(Number);
  const panel = document.querySelector('.qwen-lowvram-panel');
  const back = light(parse(getComputedStyle(panel).backgroundColor).slice(0, 3));
  return ['stage', 'pace', 'note', 'details', 'name', 'text'].map((part) => {
    const css = getComputedStyle(panel.querySelector(`[data-part=${part}]`));
    const front = light(parse(css.color).slice(0, 3));
    return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
  });
}"""


@in_both_renderers
def test_that_previews_are_off_is_hinted_at_once_with_the_switch(page: Any, small: Any, client: ComfyClient) -> None:
    hint, method = HINT, "Comfy.Execution.PreviewMethod"
    setting = "(id) => window.app.extensionManager.setting.get(id)"
    page.load(small())
    page.evaluate("(id) => window.app.extensionManager.setting.set(id, false)", hint)
    page.evaluate(SEND, EVENT | {"previews": False})
    assert "Live previews are off." in page.evaluate("() => document.querySelector('[data-part=note]').innerText")
    page.screenshot("previews")
    page.evaluate("() => document.querySelector('[data-part=previews]').click()")
    page.evaluate(PAUSE, 300)
    assert page.evaluate(setting, method) == "auto"
    page.evaluate(SEND, EVENT | {"previews": False, "stage": "done"})
    page.evaluate(PAUSE, 300)
    assert page.evaluate(setting, hint) is True
    page.evaluate(SEND, EVENT | {"previews": False, "prompt_id": "q"})
    assert lines_of(page)[-1].startswith("26 of 60 blocks")
    client.post("/settings", {method: "default", hint: True})
    page.evaluate("(id) => window.app.extensionManager.setting.set(id, 'default')", method)


@in_both_renderers
def test_a_run_of_another_tab_with_the_same_nodes_is_not_shown(page: Any, small: Any) -> None:
    page.load(small(), "first")
    graph = page.evaluate("() => window.app.rootGraph.id")
    page.evaluate(SEND, EVENT | {"prompt_id": "mine", "workflow_id": graph})
    other = {"prompt_id": "theirs", "workflow_id": "00000000-0000-4000-8000-000000000000", "step": 19}
    page.evaluate(SEND, EVENT | other)
    page.evaluate(SEND, EVENT | other | {"node": "2", "stage": "encoding", "done": 1, "total": 28})
    stop = "(detail) => window.comfyAPI.api.api.dispatchCustomEvent('execution_interrupted', detail)"
    page.evaluate(stop, {"prompt_id": "theirs", "node_id": "4"})
    assert lines_of(page)[0].startswith("step 7/20")
    assert page.evaluate("() => document.querySelector('.qwen-lowvram-line')") is None
    page.evaluate(stop, {"prompt_id": "mine", "node_id": "4"})
    assert lines_of(page)[0] == "Interrupted after 6 of 20 steps · 1:12"


@in_both_renderers
def test_a_table_of_another_tabs_run_is_not_shown(page: Any, small: Any) -> None:
    page.load(small(), "first")
    graph = page.evaluate("() => window.app.rootGraph.id")
    node = page.evaluate("""() => {
      const node = window.LiteGraph.createNode('QwenLowVRAMMemoryPlan');
      window.app.graph.add(node);
      return String(node.id);
    }""")
    other = {"prompt_id": "of another", "workflow_id": "00000000-0000-4000-8000-000000000000"}
    page.evaluate(SEND, EVENT | other)
    page.evaluate(SEND, EVENT | {"prompt_id": "of this", "workflow_id": graph})
    shown = []
    for prompt in ("of another", "of this"):
        page.evaluate(
            "(detail) => window.comfyAPI.api.api.dispatchCustomEvent('executed', detail)",
            {"node": node, "display_node": node, "prompt_id": prompt, "output": {"text": [prompt]}},
        )
        page.evaluate(PAUSE, 300)
        shown.append(page.evaluate("() => document.querySelector('.qwen-lowvram-memory').textContent"))
    assert shown == ["Run the graph to see the plan.", "of this"]


@in_both_renderers
def test_of_two_tabs_with_the_same_graph_the_one_that_queued_it_shows_the_run(page: Any, small: Any) -> None:
    page.load(small(), "first")
    graph = page.evaluate("() => window.app.rootGraph.id")
    page.evaluate("(d) => window.comfyAPI.api.api.dispatchCustomEvent('promptQueueing', d)", {"batchCount": 1})
    page.load(small(), "second")
    assert page.evaluate("() => window.app.rootGraph.id") == graph
    page.evaluate(SEND, EVENT | {"prompt_id": "of first", "workflow_id": graph})
    assert lines_of(page)[0] == "Nothing has run yet"
    page.evaluate("() => window.app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.evaluate(PAUSE, 1000)
    page.evaluate(SEND, EVENT | {"prompt_id": "of first", "workflow_id": graph})
    assert lines_of(page)[0].startswith("step 7/20")


@in_both_renderers
def test_an_event_reaches_its_own_panel_only(page: Any, small: Any) -> None:
    page.load(small())
    page.evaluate("""() => {
      const other = window.LiteGraph.createNode('QwenLowVRAMSample');
      other.pos = [940, 700];
      window.app.graph.add(other);
      other.id = 40;
      window.app.graph._nodes_by_id[40] = other;
    }""")
    page.evaluate(SEND, EVENT)
    for stranger in ("1", "99", "4:4", None):
        page.evaluate(SEND, EVENT | {"node": stranger, "step": 1})
    panels = page.evaluate(PANELS)
    assert "step 7/20" in panels["4"][0]
    assert panels["40"][0] == "Nothing has run yet"
    page.evaluate("() => window.app.graph.remove(window.app.graph.getNodeById(4))")
    page.evaluate(SEND, EVENT)
    assert page.unexpected_messages() == []


@in_both_renderers
def test_the_panel_follows_a_run_inside_a_subgraph(page: Any, small: Any, vue: bool) -> None:
    page.load(small(seed=12 + vue))
    outer = page.evaluate("""() => {
      const graph = window.app.graph;
      return graph.convertToSubgraph(new Set([graph.getNodeById(4)])).node.id;
    }""")
    assert page.run()["status"] == "success"
    page.evaluate(PAUSE, 500)
    (lines,) = page.evaluate(PANELS).values()
    assert lines[0].startswith("Done: 4 steps")
    (identity,) = page.evaluate(PANELS)
    assert identity.startswith(f"{outer}:")
    assert page.unexpected_messages() == []


@in_both_renderers
def test_an_interrupted_run_is_called_so(page: Any, small: Any, vue: bool) -> None:
    page.load(small(steps=1000, seed=14 + vue))
    page.evaluate("""() => {
      const api = window.comfyAPI.api.api;
      const stop = ({ detail }) => {
        if (detail.stage !== 'sampling') return;
        api.removeEventListener('qwen_lowvram.progress', stop);
        api.interrupt(null);
      };
      api.addEventListener('qwen_lowvram.progress', stop);
    }""")
    assert page.run()["status"] == "interrupted"
    page.evaluate(PAUSE, 300)
    assert re.fullmatch(r"Interrupted after \d+ of 1000 steps · \d:\d\d", lines_of(page)[0])


@in_both_renderers
def test_a_failed_run_says_what_went_wrong_and_what_to_do(page: Any, small: Any, vue: bool) -> None:
    page.load(small(width=16384, height=16384))  # which no schedule is made for
    assert page.run()["status"] == "error"
    page.evaluate(PAUSE, 300)
    lines = lines_of(page)
    assert lines[0] == "Failed"
    assert "What to do: " in lines[-1]
    page.screenshot(f"failed-{'vue' if vue else 'classic'}")
    page.evaluate("() => document.querySelector('.qwen-lowvram-panel [data-part=details]').click()")
    view = page.evaluate("() => document.querySelector('dialog.qwen-lowvram-view').innerText")
    assert "What went wrong" in view
    assert "What to do: " in view
    page.evaluate("() => document.querySelector('dialog.qwen-lowvram-view').close()")


ERRORS = {
    "plan.sampling_does_not_fit": (
        {
            "need_bytes": 4 * GIB,
            "limit_bytes": 3 * GIB,
            "beside": "",
            "request": "r",
            "ways": "a VRAM limit of 4.01 GB or more",
        },
        ("4.00 GiB", "3.00 GiB", "4.01 GB"),
    ),
    "vae.other_models_latents": ({"found": 64, "channels": 16}, ("64", "16")),
    "memory.ram_ran_out": ({"when": "x", "why": "y", "bound": "b", "free_gib": 1.5, "total_gib": 8.0}, ("8.0", "1.5")),
}


@pytest.mark.parametrize("code", ERRORS)
@in_chinese_in_both_renderers
def test_an_error_is_said_on_its_node_in_the_language_of_the_page(page: Any, small: Any, vue: bool, code: str) -> None:
    values, numbers = ERRORS[code]
    page.load(small())
    error = {"prompt_id": "p", "code": code, "values": values, "text": "English"}
    end = {"prompt_id": "p", "exception_message": "English", "exception_type": "x", "traceback": []}
    for node in ("4", "5"):
        page.evaluate(SEND.replace("progress", "error"), error | {"node": node})
        page.evaluate(
            "(detail) => window.comfyAPI.api.api.dispatchCustomEvent('execution_error', detail)",
            end | {"node_id": node, "node_type": "x", "executed": [], "current_inputs": {}, "current_outputs": []},
        )
    page.evaluate(PAUSE, 500)
    for text in (lines_of(page)[-1], line_of(page, "5")):
        assert re.search("[一-鿿]", text), text
        assert "English" not in text
        assert all(number in text for number in numbers), text
    page.screenshot(f"error-{code}-{'vue' if vue else 'classic'}")


@in_both_renderers
def test_a_line_says_nothing_of_an_earlier_run(page: Any, small: Any) -> None:
    page.load(small())
    send = "([kind, detail]) => window.comfyAPI.api.api.dispatchCustomEvent(kind, detail)"
    page.evaluate(SEND, EVENT | {"node": "2", "prompt_id": "first"})
    page.evaluate(send, ["execution_interrupted", {"prompt_id": "second", "node_id": "2"}])
    assert line_of(page, "2") == "Interrupted"
    live = "() => document.querySelector('.qwen-lowvram-line[role=alert]')?.getAttribute('aria-live')"
    error = {
        "prompt_id": "third", "node_id": "1", "node_type": "x", "exception_message": "It went wrong.",
        "exception_type": "x", "traceback": [], "executed": [], "current_inputs": {}, "current_outputs": [],
    }  # fmt: skip
    page.evaluate(send, ["execution_error", error])
    assert (line_of(page, "1"), page.evaluate(live)) == ("It went wrong.", "assertive")
    page.evaluate(send, ["execution_error", error | {"prompt_id": "fourth", "node_id": "4"}])
    assert lines_of(page)[0] == "Failed"
    assert (line_of(page, "1"), page.evaluate(live)) == ("", None)
    page.evaluate(send, ["execution_success", {"prompt_id": "fifth"}])
    assert lines_of(page)[0] == "Nothing has run yet"


@in_both_renderers
def test_the_panel_still_tells_of_its_run_after_a_change_of_tabs(page: Any, small: Any, vue: bool) -> None:
    page.load(small(seed=16 + vue), "first")
    assert page.run()["status"] == "success"
    page.load(small(), "second")
    assert lines_of(page)[0] == "Nothing has run yet"
    page.evaluate("() => window.app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.evaluate(PAUSE, 1000)
    assert lines_of(page)[0].startswith("Done: 4 steps")


@in_both_renderers
def test_an_error_is_still_told_after_a_change_of_tabs_until_the_next_run(page: Any, small: Any) -> None:
    page.load(small(), "first")
    graph = page.evaluate("() => window.app.rootGraph.id")
    send = "([kind, detail]) => window.comfyAPI.api.api.dispatchCustomEvent(kind, detail)"
    page.evaluate(SEND, EVENT | {"prompt_id": "fails", "workflow_id": graph})
    error = {
        "prompt_id": "fails", "node_id": "4", "node_type": "x", "exception_message": "It went wrong.",
        "exception_type": "x", "traceback": [], "executed": [], "current_inputs": {}, "current_outputs": [],
    }  # fmt: skip
    page.evaluate(send, ["execution_error", error])
    other = json.loads(json.dumps(small()))
    other["id"] = "00000000-0000-4000-8000-000000000001"
    page.load(other, "second")
    assert lines_of(page)[0] == "Nothing has run yet"
    back = "() => window.app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')"
    page.evaluate(back)
    page.evaluate(PAUSE, 1000)
    assert lines_of(page)[0].startswith("Failed")
    assert "It went wrong." in lines_of(page)
    page.evaluate(SEND, EVENT | {"prompt_id": "goes on", "workflow_id": graph})
    page.load(other, "third")
    page.evaluate(back)
    page.evaluate(PAUSE, 1000)
    assert "It went wrong." not in lines_of(page)
