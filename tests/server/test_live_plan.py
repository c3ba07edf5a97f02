"""What a run would take, asked of the real server before it; nonsense; a refusal before anything is encoded."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from devtools.client import ComfyClient, ExecutionFailed
from devtools.workflow import set_widgets, to_prompt
from small_checkpoint import SplitFiles

from .graphs import FOLDER, QWEN_IMAGE_21, with_inputs

WORKFLOWS = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))
PATH = "/qwen_lowvram/plan"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_bundled_graph_has_a_line_whose_size_is_known(
    path: Path,
    client: ComfyClient,
    object_info: dict[str, Any],
    split_files: dict[str, SplitFiles],
    folders_21: dict[str, str],
    layered_folder: str,
    lora: str,
    edit_loras: set[str],
) -> None:
    names = split_files["fp8"]
    files = {"transformer": names.transformer, "text_encoder": names.text_encoder, "vae": names.vae}
    if path in QWEN_IMAGE_21:
        files = {"transformer": folders_21["2.1"], "text_encoder": FOLDER, "vae": FOLDER}
    if "layers" in path.stem:
        files = {"transformer": layered_folder, "text_encoder": FOLDER, "vae": FOLDER}
    graph = json.loads(path.read_text(encoding="utf-8"))
    graph = set_widgets(graph, object_info, "QwenLowVRAMLoader", **files, weight_format="as stored")
    prompt = to_prompt(graph, object_info)
    for node in prompt.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = "example.png"
    (line,) = client.post(PATH, {"prompt": prompt})["lines"]
    assert line["fits"], line
    assert line["values"]["size_known"], line
    assert line["values"]["uncounted"] == [], line
    assert {prompt[node]["class_type"] for node in line["nodes"]} == {"QwenLowVRAMLoader", "QwenLowVRAMSample"}


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b'{"prompt": {}}', "text/plain", 415),
        (b"[]", "application/json", 400),
        (b'{"prompt": [1]}', "application/json", 400),
        (b'{"prompt": {"1": 2}}', "application/json", 400),
        (b"{" * 100_000, "application/json", 400),
        (b" " * 4_000_001, "application/json", 413),
        (b'{"prompt": {}}', "application/json", 200),
    ],
)
def test_what_is_no_question_is_refused(client: ComfyClient, body: bytes, kind: str, status: int) -> None:
    request = urllib.request.Request(client.url + PATH, body, {"Content-Type": kind}, method="POST")
    if status == 200:
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.loads(answer.read()) == {"lines": []}
        return
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == status


def test_an_image_that_cannot_fit_is_refused_before_its_prompt_is_read(
    client: ComfyClient, object_info: dict[str, Any], split_files: dict[str, SplitFiles]
) -> None:
    names = split_files["fp8"]
    files = {"transformer": names.transformer, "text_encoder": names.text_encoder, "vae": names.vae}
    graph = json.loads(WORKFLOWS[0].read_text(encoding="utf-8"))
    graph = set_widgets(graph, object_info, "QwenLowVRAMLoader", **files, vram_limit_gb=0.1)
    prompt = to_prompt(graph, object_info)
    (latent,) = (name for name, node in prompt.items() if node["class_type"] == "EmptySD3LatentImage")
    (encode,) = (name for name, node in prompt.items() if node["class_type"] == "QwenLowVRAMEncodePrompts")
    with pytest.raises(ExecutionFailed, match="its prompt is not encoded") as refused:
        client.run(with_inputs(prompt, latent, width=8192, height=8192))
    assert refused.value.node_id == encode
