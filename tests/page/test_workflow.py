"""The shipped graphs in the real page: they come back as they are, run to their image, and the panel follows."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from devtools.client import ComfyClient
from devtools.workflow import set_widgets, to_prompt

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
VUE_NODES = "Comfy.VueNodes.Enabled"
SAMPLE, LATENT = "QwenLowVRAMSample", "EmptySD3LatentImage"
FILES = {
    "transformer": "qwen_image_fp8_e4m3fn.safetensors",
    "text_encoder": "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "vae": "qwen_image_vae.safetensors",
}
GIB = 2**30

# what the server sends while a card with memory of its own works; the keys are compared with a real event's
EVENT: dict[str, Any] = {
    "node": "4", "stage": "sampling", "step": 7, "steps": 20, "block": 30, "blocks": 60,
    "limit_bytes": 4 * GIB, "vram_bytes": 2 * GIB, "peak_vram_bytes": 3 * GIB,
    "ram_bytes": GIB, "peak_ram_bytes": GIB, "seconds": 90.0, "seconds_per_step": 12.345,
    "forecast_seconds_per_step": 11.5,
    "plan": "MemoryPlan(1024x1024, 2 branches: 9 of 60 blocks resident, 51 streamed)",
}  # fmt: skip

SEND = "(event) => window.comfyAPI.api.api.dispatchCustomEvent('qwen_lowvram.progress', event)"
# the text of each panel by node id, wherever its graph is
PANELS = """() => {
  const found = {};
  const visit = (graph, prefix) => {
    for (const node of graph.nodes) {
      const widget = node.widgets?.find((widget) => widget.name === 'qwen_lowvram_progress');
      if (widget) found[prefix + node.id] = [...widget.element.querySelectorAll('*')].filter(
        (part) => !part.children.length && part.textContent).map((part) => part.textContent);
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
PAUSE = "(ms) => new Promise((done) => setTimeout(done, ms))"


@pytest.fixture(scope="module", params=[False, True], ids=["classic-nodes", "vue-nodes"])
def vue(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def page(open_page: Any, client: ComfyClient, vue: bool) -> Iterator[Any]:
    yield open_page({VUE_NODES: vue})
    client.post("/settings", {VUE_NODES: False})  # the server keeps settings for the next page


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
    """The graph without the view; Vue nodes also measure their own sizes."""
    saved = copy.deepcopy({key: value for key, value in graph.items() if key != "extra"})
    for node in saved["nodes"] if vue else ():
        del node["size"]
    return saved


def lines_of(page: Any, node: str = "4") -> list[str]:
    return page.evaluate(PANELS)[node]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_the_page_shows_saves_and_sends_a_shipped_graph_as_it_is(
    page: Any, vue: bool, object_info: dict[str, Any], file: Path
) -> None:
    graph = json.loads(file.read_text(encoding="utf-8"))
    page.load(graph)
    assert as_saved(page.serialize(), vue) == as_saved(graph, vue)
    prompt = {key: {name: node[name] for name in ("class_type", "inputs")} for key, node in page.prompt().items()}
    assert prompt == to_prompt(graph, object_info)
    assert_apart(page)


def assert_apart(page: Any) -> None:
    """No node is cut off, and none lies over another."""
    boxes = page.evaluate(BOXES)
    for node, kind, (left, top), (width, height), needed in boxes:
        assert height >= needed, f"{kind} is cut off."
        for other, of, (x, y), (w, h), _ in boxes:
            apart = left + width <= x or x + w <= left or top + height <= y - 30 or y + h <= top - 30  # 30: the title
            assert apart or node == other, f"{kind} lies over {of}."


def test_the_4_gb_workflow_runs_in_the_page_to_its_image(page: Any, small: Any, client: ComfyClient, vue: bool) -> None:
    # a size of its own for each: the second run would know the first one's timestep table
    page.load(small(width=160 if vue else 128, seed=11), "Qwen-Image on 4 GB")
    page.evaluate(RECORD)
    assert page.run()["status"] == "success"
    page.evaluate(PAUSE, 1000)
    seen = page.evaluate("() => document.qwenSeen")
    assert {event["event"]["stage"] for event in seen} == {"modulation", "sampling", "done"}
    assert all(set(event["event"]) == set(EVENT) for event in seen)
    shown = {event["event"]["stage"]: event["panels"]["4"] for event in seen}
    assert re.fullmatch(r"Timestep table, block \d+/\d+", shown["modulation"][0])
    assert re.fullmatch(r"Sampling, step \d/4, block \d+/\d+", shown["sampling"][0])
    assert any("blocks resident" in line for line in shown["sampling"])

    lines = lines_of(page)
    assert re.fullmatch(r"Done: 4 steps in \d+\.\d s", lines[0])
    assert re.fullmatch(r"\d+\.\d\d s/step", lines[1])
    assert lines[2:4] == ["VRAM", "none of its own: the device uses RAM"]
    assert re.fullmatch(r"\d+\.\d\d, peak \d+\.\d\d of \d+\.\d\d GiB", lines[5])
    assert re.match(r"\d+ blocks read", lines[6])
    assert lines[7].startswith("MemoryReport")

    image = page.evaluate("() => window.app.nodeOutputs['6'].images[0]")
    assert client.image(image).startswith(b"\x89PNG")
    assert page.screenshot(f"workflow-{'vue' if vue else 'classic'}").stat().st_size > 10_000
    assert page.unexpected_messages() == []


def test_the_panel_shows_memory_against_its_limit(page: Any, small: Any, vue: bool) -> None:
    page.load(small())
    page.evaluate(SEND, EVENT)
    lines = lines_of(page)
    assert lines[:2] == ["Sampling, step 7/20, block 30/60", "12.35 s/step"]
    assert lines[2:4] == ["VRAM", "2.00, peak 3.00 of 4.00 GiB"]
    parts = "document.querySelectorAll('.qwen-lowvram-panel :is([data-part=bar], [data-part=fill])')"
    widths = page.evaluate(f"() => Array.from({parts}, (part) => part.style.width)")
    assert widths[:2] == ["32.5%", "50%"]
    page.screenshot(f"panel-{'vue' if vue else 'classic'}")


def test_a_click_on_the_panel_shows_the_plan_and_another_the_run(page: Any, small: Any) -> None:
    page.load(small())
    click = "() => document.querySelector('.qwen-lowvram-panel').click()"
    visible = "() => document.querySelector('.qwen-lowvram-panel').innerText"
    page.evaluate(click)
    assert "Waiting for a run" in page.evaluate(visible)
    page.evaluate(SEND, EVENT)
    page.evaluate(click)
    assert page.evaluate(visible) == EVENT["plan"]
    page.evaluate(click)
    assert "step 7/20" in page.evaluate(visible)


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
    assert panels["40"][0] == "Waiting for a run"
    page.evaluate("() => window.app.graph.remove(window.app.graph.getNodeById(4))")
    page.evaluate(SEND, EVENT)
    assert page.unexpected_messages() == []


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
    assert re.fullmatch(r"Interrupted at step \d+/1000, block \d+/\d+", lines_of(page)[0])


def test_a_failed_run_is_called_so(page: Any, small: Any) -> None:
    page.load(small(width=16384, height=16384))  # for which 4 GB are too few
    assert page.run()["status"] == "error"
    assert lines_of(page)[0] == "Failed"


def test_the_panel_still_tells_of_its_run_after_a_change_of_tabs(page: Any, small: Any, vue: bool) -> None:
    page.load(small(seed=16 + vue), "first")
    assert page.run()["status"] == "success"
    page.load(small(), "second")
    assert lines_of(page)[0] == "Waiting for a run"
    page.evaluate("() => window.app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.evaluate(PAUSE, 1000)
    assert lines_of(page)[0].startswith("Done: 4 steps")
