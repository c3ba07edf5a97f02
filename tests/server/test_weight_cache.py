"""Quantizing on load through the real server: the image is that of the quantized weights, and the second load is
from the cache."""

import http.client
import io
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as functional
import numpy as np
import pytest
import torch
from devtools.client import ComfyClient, ExecutionFailed, PromptRefused, Run
from diffusers import QwenImagePipeline
from PIL import Image
from safetensors.torch import load_file
from small_checkpoint import SplitFiles
from torch import Tensor

from .graphs import FOLDER, WORKFLOWS, with_inputs, workflow

SIZE = {"width": 112, "height": 80, "batch_size": 1}
STEPS, SEED = 4, 5
PROMPT, NEGATIVE = "a red circle", "blurry"


@pytest.fixture
def cache(models_dir: Path) -> Iterator[Path]:
    folder = models_dir / "qwen_lowvram"
    assert files_in(folder) == []
    yield folder
    for file in files_in(folder):
        file.unlink()


@pytest.fixture
def prompt(object_info: dict[str, Any], full_pipeline: Path) -> Callable[..., dict[str, Any]]:
    """`prompt(**loader)`: the first bundled graph on the small pipeline folder, in fp32."""
    own = {"transformer": f"{full_pipeline.name} (folder)", "text_encoder": FOLDER, "vae": FOLDER, "dtype": "fp32"}

    def make(**loader: Any) -> dict[str, Any]:
        return workflow(
            WORKFLOWS[0],
            object_info,
            own | loader,
            prompts={"positive": PROMPT, "negative": NEGATIVE},
            size=SIZE,
            sample={"seed": SEED, "steps": STEPS},
        )

    return make


def made_image(client: ComfyClient, prompt: dict[str, Any]) -> tuple[np.ndarray, Run]:
    run = client.run(prompt)
    (image,) = run.images()
    return np.asarray(Image.open(io.BytesIO(client.image(image))).convert("RGB")).astype(int), run


def files_in(folder: Path) -> list[Path]:
    """The quantized weights; encoded prompts have a folder of their own in there."""
    return [path for path in folder.iterdir() if path.name != "prompts"] if folder.exists() else []


def cleared(client: ComfyClient, what: str) -> str:
    text = client.post("/qwen_lowvram/clear", {"clear": what})["text"]
    assert isinstance(text, str)
    return text


def answer(client: ComfyClient, method: str, body: bytes, **headers: str) -> tuple[int, str]:
    """Status and text of a request for clearing."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"{client.url}/qwen_lowvram/clear", body or None, names, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def stamp(file: Path) -> tuple[int, int]:
    return file.stat().st_ino, file.stat().st_mtime_ns


def decoded(file: Path) -> dict[str, Tensor]:
    """A cache file's weights in fp32, by bitsandbytes itself."""
    stored = load_file(file)
    weights = {}
    for name, data in stored.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.SCB" in stored and layer != name:
            weights[name] = functional.int8_vectorwise_dequant(data, stored[f"{layer}.SCB"])
        elif f"{name}.absmax" in stored:
            state = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")}
            quant_state = functional.QuantState.from_dict(state, torch.device("cpu"))
            weights[name] = functional.dequantize_4bit(data, quant_state).float()
    return weights


def diffusers_image(pipeline: QwenImagePipeline) -> np.ndarray:
    image = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        true_cfg_scale=4.0,
        width=SIZE["width"],
        height=SIZE["height"],
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        max_sequence_length=1024,
        output_type="np",
    ).images[0]
    return (255 * image).clip(0, 255).astype(np.uint8).astype(int)


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference - reference.mean()))


@pytest.mark.parametrize(
    ("weight_format", "codec", "least", "most"), [("int8", "bnb_int8", 0.005, 0.03), ("nf4", "nf4", 0.08, 0.25)]
)
def test_quantizing_on_load_makes_the_image_of_the_quantized_weights(
    weight_format: str,
    codec: str,
    least: float,
    most: float,
    client: ComfyClient,
    prompt: Callable[..., dict[str, Any]],
    full_pipeline: Path,
    cache: Path,
) -> None:
    ours, run = made_image(client, prompt(weight_format=weight_format))
    assert run.ui("qwen_lowvram_report")[0]["weight_format"] == codec
    (file,) = files_in(cache)
    pipeline = QwenImagePipeline.from_pretrained(full_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    weights = decoded(file)
    assert len(weights) == 4 * 12
    assert not pipeline.transformer.load_state_dict(weights, strict=False).unexpected_keys
    assert np.abs(ours - diffusers_image(pipeline)).max() <= 1

    plain, _ = made_image(client, prompt())
    assert least < relative(ours, plain) < most

    made = stamp(file)
    again, run = made_image(client, prompt(weight_format=weight_format, vram_limit_gb=8.0))
    assert "1" in run.executed()  # the loader
    assert run.ui("qwen_lowvram_report")[0]["weight_format"] == codec
    assert np.array_equal(again, ours)
    assert stamp(file) == made


def test_the_node_shows_and_clears_and_the_next_run_quantizes_again(
    client: ComfyClient, prompt: Callable[..., dict[str, Any]], full_pipeline: Path, cache: Path
) -> None:
    def node(action: str) -> str:
        prompt = {"1": {"class_type": "QwenLowVRAMWeightCache", "inputs": {"action": action}}}
        (text,) = client.run(prompt).ui("text")
        return text

    graph = prompt(weight_format="fp4")
    first, _ = made_image(client, graph)
    shown = node("show")
    assert shown.startswith(f"{cache}: 1 file, ")
    assert f"{full_pipeline.name}/transformer, fp4, " in shown
    assert cleared(client, "unused").endswith("removed: nothing")
    assert "Nothing was cleared" in node("clear all")
    assert len(files_in(cache)) == 1
    assert "removed: 1 file" in cleared(client, "all")
    assert files_in(cache) == []
    assert f"{cache}: nothing" in node("show")
    again, _ = made_image(client, with_inputs(graph, "4", seed=SEED + 1))
    assert not np.array_equal(again, first)
    assert len(files_in(cache)) == 1


def test_only_a_request_of_the_own_page_or_a_program_clears(client: ComfyClient, cache: Path) -> None:
    cache.mkdir(exist_ok=True)
    file = cache / "model.nf4.0123456789abcdef.safetensors"  # damaged: any clearing of weights removes it
    file.write_bytes(b"")
    everything, json_type = b'{"clear": "all"}', {"Content_Type": "application/json"}
    for body in (b" ", b"{", b"[]", b"[" * 900):
        status, text = answer(client, "POST", body, **json_type)
        assert (status, "a JSON object" in text) == (400, True)
    for body in (b'{"clear": null}', b'{"clear": ["all"]}', b'{"clear": "../.."}'):
        status, text = answer(client, "POST", body, **json_type)
        assert (status, "unused, all, prompts" in text) == (400, True)
    assert answer(client, "POST", everything + b" " * 1000, **json_type)[0] == 413
    assert answer(client, "POST", everything, Content_Type="text/plain")[0] == 415
    assert answer(client, "GET", b"")[0] in (404, 405)
    assert answer(client, "POST", everything, Sec_Fetch_Site="cross-site", **json_type)[0] == 403
    assert answer(client, "POST", everything, Origin="http://example.org", **json_type)[0] == 403
    assert file.exists()
    status, text = answer(client, "POST", everything, **json_type)
    assert (status, "removed: 1 file" in text) == (200, True)
    assert not file.exists()


def test_a_quantized_file_in_another_format_is_refused_before_anything_is_loaded(
    client: ComfyClient, prompt: Callable[..., dict[str, Any]], split_files: dict[str, SplitFiles], models_dir: Path
) -> None:
    names = split_files["fp8_scaled"]
    files = {"transformer": names.transformer, "text_encoder": names.text_encoder, "vae": names.vae}
    with pytest.raises(ExecutionFailed, match=r"weight_format: .*is quantized already"):
        client.run(prompt(**files, weight_format="nf4"))
    with pytest.raises(PromptRefused, match="Value not in list: weight_format: 'q4'"):
        client.run(with_inputs(prompt(**files), "1", weight_format="q4"))
    made_image(client, prompt(**files, weight_format="fp8_e4m3fn_scaled"))
    assert files_in(models_dir / "qwen_lowvram") == []


def test_a_request_that_comes_in_two_pieces_is_read_whole(client: ComfyClient) -> None:
    """As a slow line cuts it."""
    body = b'{"clear": "unused"}'
    connection = http.client.HTTPConnection(client.url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/qwen_lowvram/clear")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    for piece in (body[:8], body[8:]):
        connection.send(piece)
        time.sleep(0.3)
    assert connection.getresponse().status == 200
    connection.close()
