"""Where nothing tells which Edit model a file is, the page shows the choice to make on the loader."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from devtools.client import ComfyClient
from small_checkpoint import SplitFiles

VUE_NODES = "Comfy.VueNodes.Enabled"
ADD = """(loader) => {
  const graph = window.app.graph;
  graph.clear();
  const add = (kind) => { const node = window.LiteGraph.createNode(kind); graph.add(node); return node; };
  const [load, text, shown] = ['QwenLowVRAMLoader', 'CLIPTextEncode', 'PreviewAny'].map(add);
  for (const [name, value] of Object.entries(loader)) load.widgets.find((w) => w.name === name).value = value;
  load.connect(1, text, 0);
  text.connect(0, shown, 0);
}"""
TEXT = "() => document.body.innerText"


@pytest.fixture(scope="module", params=[False, True], ids=["classic-nodes", "vue-nodes"])
def page(request: pytest.FixtureRequest, open_page: Any, client: ComfyClient) -> Iterator[Any]:
    with open_page({VUE_NODES: request.param}) as opened:
        yield opened
    client.post("/settings", {VUE_NODES: False})  # the server keeps settings for the next page


def test_the_choice_to_make_is_shown_on_the_loader(
    page: Any, models_dir: Path, split_files: dict[str, SplitFiles], request: pytest.FixtureRequest
) -> None:
    names = split_files["bf16"]
    # another one for each page: what the server has made already it does not tell again
    named = models_dir / "diffusion_models" / f"QIE_merge_{request.node.callspec.params['page']}.safetensors"
    named.hardlink_to(models_dir / "diffusion_models" / names.transformer)
    try:
        page.evaluate(ADD, {"transformer": named.name, "text_encoder": names.text_encoder, "vae": names.vae})
        assert "set variant to that" not in page.evaluate(TEXT)
        assert page.run()["status"] == "success"
        page.screenshot("variant-doubt")
        shown = page.evaluate(TEXT)
        assert "If it is Qwen-Image-Edit-2509 or Qwen-Image-Edit-2511, set variant to that in" in shown
        assert page.unexpected_messages() == []
    finally:
        named.unlink()
