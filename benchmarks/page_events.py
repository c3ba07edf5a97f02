"""What an event of a run costs the page: the pack's own script alone, from the event to its return.

    python dev.py bench page_events

A real page with Sample's panel and a node with a line of its own is told of a run, 300 events of each stage, in both
renderers. The browser lays out and draws afterwards, once a frame, whatever came in: that is not counted. The goal is
16 ms, a frame; at most four such events come in a second.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from devtools.browser import find_page_tools
from devtools.cache import cache_folder
from devtools.comfyui import comfyui_version, require_comfyui
from devtools.environment import venv_folder
from devtools.page import Page
from devtools.server import ComfyServer
from run_facts import FACTS, GIB

RUN = {
    "prompt_id": "p", "steps": 20, "block": 30, "blocks": 60, "share": 0.3, "done": 20, "total": 60,
    "vram_bytes": 2 * GIB, "peak_vram_bytes": 3 * GIB, "ram_bytes": GIB, "peak_ram_bytes": GIB, "held_bytes": GIB,
    "seconds_per_step": 12.3, "seconds_left": 130.0, "previews": True, "facts": FACTS,
}  # fmt: skip
ADD = """() => {
  window.app.graph.clear();
  return ['QwenLowVRAMSample', 'QwenLowVRAMEncodePrompts'].map((kind, number) => {
    const node = window.LiteGraph.createNode(kind);
    node.pos = [100 + 500 * number, 100];
    window.app.graph.add(node);
    return String(node.id);
  });
}"""
MEASURE = """({ event, turns }) => {
  const api = window.comfyAPI.api.api, took = [];
  for (let turn = 0; turn < turns; turn++) {
    const detail = { ...event, step: 1 + (turn % 20), seconds: turn / 4 };
    const start = performance.now();
    api.dispatchCustomEvent('qwen_lowvram.progress', detail);
    took.push(performance.now() - start);
  }
  return took;
}"""
PAUSE = "(ms) => new Promise((done) => setTimeout(done, ms))"


def rows(quick: bool) -> list[dict[str, Any]]:
    comfyui, cache = require_comfyui(), cache_folder()
    tools = find_page_tools(cache, venv_folder(cache, comfyui_version(comfyui)))
    if tools is None:
        raise SystemExit(
            "There is no browser yet. Run `python dev.py test tests/page/test_help.py` once: it finds one."
        )
    measured = []
    with tempfile.TemporaryDirectory() as base, ComfyServer(comfyui, Path(base), cpu=True) as server:
        for vue in (False, True):
            page = Page(tools, server.url, {"Comfy.VueNodes.Enabled": vue}, {"width": 1600, "height": 900})
            try:
                page.open()
                measured += _of_page(page, "Vue nodes" if vue else "classic nodes", 30 if quick else 300)
            finally:
                page.close()
    return measured


def _of_page(page: Page, renderer: str, turns: int) -> list[dict[str, Any]]:
    sample, encode = page.evaluate(ADD)
    page.evaluate(PAUSE, 1000)
    cases = {
        "sampling": {**RUN, "node": sample, "stage": "sampling"},
        "reading weights": {**RUN, "node": sample, "stage": "modulation"},
        "encoding": {**RUN, "node": encode, "stage": "encoding", "prompt_id": "q"},
    }
    found = []
    for case, event in cases.items():
        page.evaluate(MEASURE, {"event": event, "turns": 5})  # the line is made, and the code compiled
        took = sorted(page.evaluate(MEASURE, {"event": event, "turns": turns}))
        late = took[turns * 99 // 100]
        times = {"median_ms": statistics.median(took), "of_100_the_99th_ms": late, "most_ms": took[-1]}
        found.append({"who": renderer, "case": f"{case}, {turns} events", **times})
    return found
