"""What a person can do wrong in a bundled workflow: each brought about in a real page, by real files and widgets.

Used by page_runs.py.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devtools.cache import REPOSITORY
from devtools.page import Page
from devtools.workflow import set_widgets
from page_image import PAUSE
from workflow_maker.catalogue import workflows
from workflow_thumbnails import BYPASSED

LOADER, LATENT = "QwenLowVRAMLoader", "EmptySD3LatentImage"
SIDE_PX = 128
MINIATURE = {
    "transformer": "miniature (folder)",
    "text_encoder": "from the folder",
    "vae": "from the folder",
    "variant": "auto",
}
DAMAGED, OTHER = "damaged.safetensors", "vae-as-transformer.safetensors"
# what nodes say: before the run, and after it
BEFORE = """async () => {
  const line = document.querySelector('.qwen-lowvram-plan-line');
  const soon = () => new Promise((done) => setTimeout(done, 100));
  for (let waited = 0; waited < 8000 && !line.innerText; waited += 100) await soon();
  return line.innerText;
}"""
TEXTS = """() => [...document.querySelectorAll('.qwen-lowvram-panel, .qwen-lowvram-line')]
  .map((part) => part.innerText.trim()).filter(Boolean)"""
FOREIGN_VAE = """(values) => {
  const graph = window.app.graph;
  const other = window.LiteGraph.createNode('QwenLowVRAMLoader');
  graph.add(other);
  other.pos = [0, 900];
  for (const [name, value] of Object.entries(values)) other.widgets.find((each) => each.name === name).value = value;
  const decode = graph.nodes.find((node) => node.type === 'QwenLowVRAMDecode');
  const output = other.outputs.findIndex((slot) => slot.type === 'VAE');
  other.connect(output, decode, decode.inputs.findIndex((slot) => slot.type === 'VAE'));
  window.comfyAPI.api.api.dispatchCustomEvent('graphChanged');
}"""


@dataclass(frozen=True)
class Wrong:
    """status: how the run ends. said: of its message, or of the line before it in the page's language. widgets: by node
    type, others than the miniature's."""

    status: str
    said: str
    stem: str = "01"
    widgets: dict[str, dict[str, Any]] = field(default_factory=dict)
    foreign_vae: bool = False
    said_in_chinese: str = "-"


WRONGS = {
    "a file that is not there": Wrong(
        "refused", "There is no", widgets={LOADER: {"transformer": "gone.safetensors"}}
    ),
    "a damaged file": Wrong("refused", "damaged", widgets={LOADER: {"transformer": DAMAGED}}),
    "a VAE as the transformer": Wrong("refused", "transformer", widgets={LOADER: {"transformer": OTHER}}),
    "a LoRA that is not there": Wrong(
        "refused", "There is no", "07", {"QwenLowVRAMLoadLora": {"lora_name": "gone.safetensors"}}
    ),
    "a text model in the graph that edits": Wrong(
        "success", "not trained for", "10", {"QwenLowVRAMEncodeEditPrompt": {"megapixels": 0.02}},
        said_in_chinese="没有为此训练过",
    ),
    "an editing model in the graph from text": Wrong(
        "error", "edit", widgets={LOADER: {"transformer": "miniature-edit (folder)"}}
    ),
    "another model's VAE in Decode": Wrong("error", "VAE", foreign_vae=True),
    "an image that does not fit": Wrong("error", "not fit", widgets={LATENT: {"width": 16384, "height": 16384}}),
}  # fmt: skip


def put_files(models: Path) -> None:
    """The wrong ones, into ComfyUI's folder of models."""
    folder = models / "diffusion_models"
    whole = REPOSITORY / "miniature" / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(whole, folder / OTHER)
    (folder / DAMAGED).write_bytes(whole.read_bytes()[:5000])


def brought_to(page: Page, info: Any, name: str, wrong: Wrong) -> tuple[str, list[str], bool]:
    """How it ended and what was said in English, what the nodes show, and whether that is as it should be."""
    stem = next(stem for stem, _ in workflows() if stem.startswith(wrong.stem))
    graph = json.loads((REPOSITORY / "workflows" / f"{stem}.json").read_text(encoding="utf-8"))
    widgets: dict[str, dict[str, Any]] = {
        LOADER: MINIATURE | {"variant": "auto"},
        LATENT: {"width": SIDE_PX, "height": SIDE_PX},
    }
    for kind in widgets | wrong.widgets:
        graph = set_widgets(graph, info, kind, **(widgets.get(kind, {}) | wrong.widgets.get(kind, {})))
    for node in graph["nodes"]:
        if node["type"] == "QwenLowVRAMLoadLora" and "QwenLowVRAMLoadLora" not in wrong.widgets:
            node["mode"] = BYPASSED
    page.load(graph, name)
    if wrong.foreign_vae:
        page.evaluate(BEFORE)
        page.evaluate(FOREIGN_VAE, MINIATURE | {"transformer": "miniature-2.1 (folder)"})
        page.evaluate(PAUSE, 1500)
    before = page.evaluate(BEFORE)
    end = page.run(120)
    page.evaluate(PAUSE, 700)
    told = json.dumps(end["detail"], ensure_ascii=False)
    shown = [before, *page.evaluate(TEXTS)]
    said = wrong.said in told + before or wrong.said_in_chinese in before
    right = end["status"] == wrong.status and said
    return f"{end['status']}: {told}", shown, right
