"""The page's model check: what is missing, with its links; a download that a person starts, here without a network."""

import json
from pathlib import Path
from typing import Any

import pytest
from devtools.cache import REPOSITORY
from devtools.client import ComfyClient

from .conftest import in_both_languages

WORKFLOW = min((REPOSITORY / "workflows").glob("*4 GB - Lightning in 8 steps.json"))
# a person gets to it with Tab and presses Enter: the browser makes a click of it; how many of them can be seen
PRESS = """() => {
  const shown = [...document.querySelectorAll('button.qwen-lowvram-check')].filter((button) => button.offsetParent);
  shown[0].click();
  return shown.length;
}"""
ROWS = """async (count) => {
  const rows = () => [...document.querySelectorAll('.qwen-lowvram-models li[data-state]')];
  for (let waited = 0; waited < 30000 && rows().length < count; waited += 50)
    await new Promise((done) => setTimeout(done, 50));
  return rows().map((row) => ({
    state: row.dataset.state, text: row.innerText, links: [...row.querySelectorAll('a')].map((link) => link.href),
    buttons: [...row.querySelectorAll('button')].map((button) => button.dataset.download),
  }));
}"""
DOWNLOAD = """async () => {
  document.querySelector('.qwen-lowvram-models button[data-download]').click();
  const ended = () => document.querySelector('.qwen-lowvram-models [data-state=failed][role=status]');
  for (let waited = 0; waited < 30000 && !ended(); waited += 50) await new Promise((done) => setTimeout(done, 50));
  return ended()?.innerText;
}"""
# a download that goes on: is the button that stops it still the one that has the focus?
RUNNING = """() => {
  const tell = (done_bytes) => window.comfyAPI.api.api.dispatchCustomEvent('qwen_lowvram.download', {
    folder: 'vae', name: 'some.safetensors', state: 'running', file: 1, files: 1, done_bytes, total_bytes: 8e9,
  });
  tell(1e9);
  const stop = document.querySelector('.qwen-lowvram-models [role=status] button');
  stop.focus();
  tell(2e9);
  return [document.activeElement === stop, stop.parentElement.querySelector('progress').value];
}"""
CLOSE = """async () => {
  document.querySelector('.qwen-lowvram-models').close();
  await new Promise((done) => setTimeout(done, 200));
  return document.querySelectorAll('.qwen-lowvram-models').length;
}"""


@in_both_languages
def test_the_check_lists_the_files_and_says_that_there_is_no_network(
    page: Any, language: str, models_dir: Path
) -> None:
    english = language == "en"
    page.load(json.loads(WORKFLOW.read_text(encoding="utf-8")))
    assert page.evaluate(PRESS) == 1
    rows = page.evaluate(ROWS, 4)
    assert [row["state"] for row in rows] == ["missing"] * 4
    names = ["fp8_e4m3fn_scaled", "qwen_2.5_vl_7b_fp8_scaled", "qwen_image_vae", "Lightning-8steps-V2.0-bf16"]
    assert [name in row["text"] for name, row in zip(names, rows, strict=True)] == [True] * 4
    sizes = ["20.4 GB", "9.4 GB", "0.25 GB", "0.85 GB"]
    assert [size in row["text"] for size, row in zip(sizes, rows, strict=True)] == [True] * 4
    for row in rows:
        hosts = [link.split("/")[2] for link in row["links"]]
        assert hosts == (["huggingface.co", "hf-mirror.com"] if english else ["hf-mirror.com", "huggingface.co"])
        assert row["buttons"] == (["hub", "mirror"] if english else ["mirror", "hub"])
        assert ("belongs in models/" if english else "应放在 models/") in row["text"]
    page.screenshot(f"model-check-{language}")
    assert page.evaluate(RUNNING) == [True, 2e9]
    said = page.evaluate(DOWNLOAD)
    assert ("cannot be reached" if english else "无法连接") in said
    page.screenshot(f"model-check-no-network-{language}")
    assert list((models_dir / "diffusion_models").glob("*.part")) == []
    assert page.evaluate(CLOSE) == 0
    assert page.unexpected_messages() == []


@pytest.mark.parametrize(
    "body",
    [
        {"folder": "vae", "name": "../qwen_image_vae.safetensors", "source": "hub"},
        {"folder": "vae", "name": "mine.safetensors", "source": "hub"},
        {"folder": "vae", "name": "qwen_image_vae.safetensors", "source": "http://example.org"},
        {"folder": ["vae"], "name": None},
    ],
)
def test_nothing_but_the_list_can_be_asked_for(client: ComfyClient, body: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="400"):
        client.post("/qwen_lowvram/download", body)
