"""What nodes tell while they run stands on them, in the page's language: whose file it may be, what a LoRA did."""

from pathlib import Path
from typing import Any

from lora_files import make_parts, write_lora
from safetensors import safe_open
from small_checkpoint import SplitFiles

from .conftest import in_both_languages

ADD = """([loader, lora]) => {
  const graph = window.app.graph;
  graph.clear();
  const add = (kind) => { const node = window.LiteGraph.createNode(kind); graph.add(node); return node; };
  const [load, change, shown] = ['QwenLowVRAMLoader', 'QwenLowVRAMLoadLora', 'PreviewAny'].map(add);
  for (const [node, values] of [[load, loader], [change, lora]])
    for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value;
  load.connect(0, change, 0);
  change.connect(1, shown, 0);
  for (const [at, node] of [load, change, shown].entries()) node.pos = [100 + 450 * at, 100];
}"""
TEXT = "() => document.body.innerText"
TEXT_WITH = """async (texts) => {
  const there = () => texts.every((text) => document.body.innerText.includes(text));
  for (let waited = 0; waited < 3000 && !there(); waited += 50) await new Promise((done) => setTimeout(done, 50));
  return document.body.innerText;
}"""
TOLD = {  # the doubt about the file, and what was used of the LoRA
    "en": (
        "If it is Qwen-Image-Edit-2509 or Qwen-Image-Edit-2511, set variant to that in",
        "2 of 2 keys of on-{page}.safetensors are used; they change 1 weight.",
    ),
    "zh": (
        "如果它是 Qwen-Image-Edit-2509 或 Qwen-Image-Edit-2511，请在",
        "on-{page}.safetensors 的 2 个键中使用了 2 个，修改 1 个权重。",
    ),
}


@in_both_languages
def test_what_nodes_tell_is_shown_on_them(
    page: Any, language: str, models_dir: Path, split_files: dict[str, SplitFiles]
) -> None:
    names = split_files["bf16"]
    # others for each page: what the server has made already it does not tell again
    transformer = models_dir / "diffusion_models" / names.transformer
    named = transformer.with_name(f"QIE_merge_{language}.safetensors")
    named.hardlink_to(transformer)
    with safe_open(transformer, framework="pt") as file:
        shape = file.get_slice("img_in.weight").get_shape()
    (models_dir / "loras").mkdir(exist_ok=True)
    lora = write_lora(models_dir / "loras" / f"on-{language}.safetensors", {"img_in": make_parts("lora", shape)})
    told = [text.format(page=language) for text in TOLD[language]]
    try:
        loader = {"transformer": named.name, "text_encoder": names.text_encoder, "vae": names.vae}
        page.evaluate(ADD, [loader, {"lora_name": lora.name}])
        before = page.evaluate(TEXT)
        assert page.run()["status"] == "success"
        after = page.evaluate(TEXT_WITH, told)
        page.screenshot(f"told-{language}")
        assert [text in before for text in told] == [False, False]
        assert [text in after for text in told] == [True, True]
        assert page.unexpected_messages() == []
    finally:
        named.unlink()
        lora.unlink()
