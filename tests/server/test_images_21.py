"""Qwen-Image-2.1 through the real server: ComfyUI's own samplers and text, latent and VAE nodes on our loader."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devtools.client import ComfyClient, ExecutionFailed
from devtools.server import ComfyServer
from PIL import Image
from qwenimage_lowvram.engine.models.qwen_image_21.schedule import TURBO_SIGMAS
from safetensors.torch import load_file

WIDTH, HEIGHT = 96, 64
SIGMAS = ", ".join(map(str, (*TURBO_SIGMAS, 0)))


@pytest.fixture(scope="module")
def folder(folders_21: dict[str, str]) -> str:
    return folders_21["2.1-Turbo"]


def graph(folder: str, **nodes: Any) -> dict[str, Any]:
    """The published template's nodes for Turbo, with our loader in the place of its three; saved as latents and as an
    image."""
    choices = {"transformer": folder, "text_encoder": "from the folder", "vae": "from the folder"}
    settings = {"dtype": "fp32", "weight_format": "auto", "vram_limit_gb": 0.0, "timesteps": "fp32"}
    prompt = {
        "1": ("QwenLowVRAMLoader", {**choices, **settings}),
        "2": ("CLIPTextEncode", {"clip": ["1", 1], "text": 'a sign that says "红色"'}),
        "3": ("CLIPTextEncode", {"clip": ["1", 1], "text": ""}),
        "4": ("EmptyLatentImage", {"width": WIDTH, "height": HEIGHT, "batch_size": 1}),
        "5": ("ManualSigmas", {"sigmas": SIGMAS}),
        "6": ("CFGGuider", {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "cfg": 1.0}),
        "7": ("RandomNoise", {"noise_seed": 5}),
        "8": ("KSamplerSelect", {"sampler_name": "euler"}),
        "9": (
            "SamplerCustomAdvanced",
            {"noise": ["7", 0], "guider": ["6", 0], "sampler": ["8", 0], "sigmas": ["5", 0], "latent_image": ["4", 0]},
        ),
        "10": ("VAEDecode", {"samples": ["9", 0], "vae": ["1", 2]}),
        "11": ("SaveImage", {"images": ["10", 0], "filename_prefix": "turbo"}),
        "12": ("SaveLatent", {"samples": ["9", 0], "filename_prefix": "turbo"}),
        **{name.removeprefix("n"): node for name, node in nodes.items()},
    }
    return {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in prompt.items()}


def made(client: ComfyClient, server: ComfyServer, prompt: dict[str, Any]) -> tuple[Image.Image, torch.Tensor]:
    run = client.run(prompt)
    (saved,) = (entry for output in run.outputs.values() for entry in output.get("latents", ()))
    latents = load_file(server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]
    return Image.open(io.BytesIO(client.image(run.images()[0]))), latents


def test_the_templates_graph_makes_a_transparent_image(
    client: ComfyClient, comfy_server: ComfyServer, folder: str
) -> None:
    image, latents = made(client, comfy_server, graph(folder))
    assert (image.size, image.mode) == ((WIDTH, HEIGHT), "RGBA")
    assert latents.shape == (1, 64, HEIGHT // 16, WIDTH // 16)
    assert np.asarray(image).std() > 5


def test_sample_with_its_preset_makes_the_same_latents(
    client: ComfyClient, comfy_server: ComfyServer, folder: str
) -> None:
    inputs = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": 5}
    inputs |= {"steps": 20, "cfg": 4.0, "sampler": "euler", "scheduler": "qwen_image", "denoise": 1.0}
    inputs |= {"norm_rescale": True, "preset": "2.1-Turbo, 8 steps"}
    _, theirs = made(client, comfy_server, graph(folder))
    _, ours = made(client, comfy_server, graph(folder, n9=("QwenLowVRAMSample", inputs)))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_an_edit_of_an_image_with_a_mask_runs_to_its_image(
    client: ComfyClient, comfy_server: ComfyServer, folder: str
) -> None:
    values = np.random.default_rng(0).integers(0, 255, (320, 320, 4), dtype=np.uint8)
    Image.fromarray(values).save(comfy_server.base / "input" / "shown.png")
    texts = {"positive": "remove the background", "negative": "", "megapixels": 0.1, "width": 0, "height": 0}
    edit = {"clip": ["1", 1], "vae": ["1", 2], "image1": ["13", 0], "batch_size": 1, "variant": "auto", **texts}
    prompt = graph(
        folder,
        n13=("LoadImage", {"image": "shown.png"}),
        n2=("QwenLowVRAMEncodeEditPrompt", edit),
        n3=("QwenLowVRAMEncodePrompts", {"clip": ["1", 1], "positive": "", "negative": ""}),
        n4=("SetLatentNoiseMask", {"samples": ["14", 0], "mask": ["13", 1]}),
        n14=("VAEEncode", {"pixels": ["13", 0], "vae": ["1", 2]}),
    )
    image, latents = made(client, comfy_server, prompt)
    assert (image.size, image.mode) == ((320, 320), "RGBA")
    assert torch.isfinite(latents).all()


def test_a_thirteenth_image_is_refused_before_any_is_seen(
    client: ComfyClient, comfy_server: ComfyServer, folder: str
) -> None:
    """The page has no such input, and ComfyUI hands what a program links to one on to the node."""
    Image.new("RGB", (320, 320)).save(comfy_server.base / "input" / "plain.png")
    texts = {"positive": "a cat", "negative": "", "megapixels": 0.1, "width": 0, "height": 0}
    edit = {"clip": ["1", 1], "vae": ["1", 2], "batch_size": 1, "variant": "auto", **texts}
    edit |= {f"image{i + 1}": ["13", 0] for i in range(13)}
    nodes = {"n13": ("LoadImage", {"image": "plain.png"}), "n2": ("QwenLowVRAMEncodeEditPrompt", edit)}
    with pytest.raises(
        ExecutionFailed, match=r"no input 'image13' here: a model can be shown at most 12 images"
    ) as failure:
        client.run(graph(folder, **nodes))
    assert failure.value.node_id == "2"


def test_a_vae_of_the_20b_models_is_refused_at_its_input(client: ComfyClient, folder: str, models_dir: Path) -> None:
    old = next((models_dir / "vae").glob("*.safetensors")).name
    loader = graph(folder)["1"]["inputs"] | {"vae": old}
    with pytest.raises(ExecutionFailed, match=r"vae: .* is another model's VAE: it has 16 latent channels") as failure:
        client.run(graph(folder, n1=("QwenLowVRAMLoader", loader)))
    assert failure.value.node_id == "1"
