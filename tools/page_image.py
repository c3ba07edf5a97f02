"""Make the image of README that shows the page in use: a bundled workflow, run on the miniature in a real page.

    PYTHONPATH=tools/alias:tools python tools/page_image.py

writes docs/page.jpg. Needs the browser that `python dev.py test` sets up.
"""

import json
from pathlib import Path
from typing import Any

from devtools.browser import find_page_tools
from devtools.cache import REPOSITORY, cache_folder
from devtools.comfyui import comfyui_version, require_comfyui
from devtools.environment import venv_folder
from devtools.page import Page
from devtools.workflow import set_widgets
from PIL import Image
from workflow_thumbnails import serving

WORKFLOW = "01 - Low VRAM 4 GB - Qwen-Image"
TARGET = REPOSITORY / "docs" / "page.jpg"
VIEW = {"width": 1700, "height": 860}
PROMPT = "a large red circle left of a small blue square on a white background"
# everything but the note, as large as it fits
FIT = """() => {
  const shown = window.app.graph.nodes.filter((node) => node.type !== 'MarkdownNote');
  const [left, top] = [0, 1].map((axis) => Math.min(...shown.map((node) => node.pos[axis])));
  const [right, bottom] = [0, 1].map((axis) => Math.max(...shown.map((node) => node.pos[axis] + node.size[axis])));
  const { ds, canvas } = window.app.canvas;
  const [wide, high] = [canvas.clientWidth - 120, canvas.clientHeight - 190];
  ds.scale = Math.min(wide / (right - left), high / (bottom - top));
  ds.offset[0] = 80 / ds.scale - left;
  ds.offset[1] = 150 / ds.scale - top;
  window.app.canvas.setDirty(true, true);
}"""
PAUSE = "(ms) => new Promise((done) => setTimeout(done, ms))"


def main() -> None:
    comfyui = require_comfyui()
    tools = find_page_tools(cache_folder(), venv_folder(cache_folder(), comfyui_version(comfyui)))
    if tools is None:
        raise SystemExit("There is no browser yet: python dev.py test finds or fetches one.")
    with serving() as (server, client):
        graph = adapted(json.loads((REPOSITORY / "workflows" / f"{WORKFLOW}.json").read_text(encoding="utf-8")), client)
        page = Page(tools, server.url, {"Comfy.VueNodes.Enabled": True, "Comfy.Minimap.Visible": False}, VIEW)
        try:
            page.open()
            page.load(graph, WORKFLOW)
            page.evaluate(FIT)
            ended = page.run()
            if ended["status"] != "success":
                raise SystemExit(f"The run ended with {ended}.")
            page.evaluate(PAUSE, 3000)  # for the image to come
            save(page.screenshot("page-image"))
        finally:
            page.close()


def adapted(graph: dict[str, Any], client: Any) -> dict[str, Any]:
    info, folder = client.object_info(), "from the folder"
    graph = set_widgets(
        graph, info, "QwenLowVRAMLoader", transformer="miniature (folder)", text_encoder=folder, vae=folder
    )
    graph = set_widgets(graph, info, "EmptySD3LatentImage", width=128, height=128)
    return set_widgets(graph, info, "QwenLowVRAMEncodePrompts", positive=PROMPT, negative=" ")


def save(screenshot: Path) -> None:
    Image.open(screenshot).convert("RGB").save(TARGET, quality=85, optimize=True)
    print(TARGET)


if __name__ == "__main__":
    main()
