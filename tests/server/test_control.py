"""ControlNet graphs through a real server: our loader, and ComfyUI's own, of transformer and VAE, on the same files."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from control_files import write_diffsynth, write_fun, write_instantx
from devtools.client import ComfyClient, ExecutionFailed
from devtools.server import ComfyServer
from native_sizes import custom_node
from PIL import Image
from safetensors.torch import load_file
from split_files import SplitFiles, write_split_files

from .graphs import FOLDER, Prompt, changed, with_inputs

STEPS = 3


@pytest.fixture(scope="module")
def server(start_server: Callable[..., ComfyServer], server_base: Path, full_pipeline: Path) -> Iterator[ComfyServer]:
    """A server whose own loaders open small files, with ControlNets and a picture to control with."""
    folder = server_base / "models" / "controlnet"
    write_instantx(folder / "union.safetensors", full_pipeline / "transformer", layers=20)
    write_instantx(folder / "inpaint.safetensors", full_pipeline / "transformer", layers=2, mask_channels=4)
    write_fun(folder / "fun.safetensors", full_pipeline / "transformer")
    write_diffsynth(server_base / "models" / "model_patches" / "canny.safetensors", full_pipeline / "transformer")
    values = np.random.default_rng(0).integers(0, 255, (9, 15, 4), dtype=np.uint8)
    Image.fromarray(values).resize((120, 72)).save(server_base / "input" / "control.png")
    node = server_base / "custom_nodes" / "small_sizes.py"
    node.write_text(custom_node(), encoding="utf-8")
    yield start_server()
    node.unlink()


@pytest.fixture(scope="module")
def files(full_pipeline: Path, server_base: Path) -> SplitFiles:
    return write_split_files(full_pipeline, server_base / "models", dtype="fp32", name="control")


@pytest.fixture
def graph(full_pipeline: Path, files: SplitFiles) -> Callable[[bool], Prompt]:
    """`graph(ours)`: whose loaders; conditions 8, sampler 4, saved latent 7."""

    def make(ours: bool) -> Prompt:
        loader = {
            "transformer": f"{full_pipeline.name} (folder)", "text_encoder": FOLDER, "vae": FOLDER, "dtype": "fp32",
            "weight_format": "as stored", "vram_limit_gb": 0.0, "timesteps": "fp32", "variant": "auto",
        }  # fmt: skip
        model, vae = (["1", 0], ["1", 2]) if ours else (["20", 0], ["21", 0])
        control = {
            "positive": ["2", 0], "negative": ["2", 1], "control_net": ["9", 0], "image": ["10", 0], "strength": 0.8,
            "start_percent": 0.0, "end_percent": 0.9, "vae": vae,
        }  # fmt: skip
        sample = {
            "model": model, "positive": ["8", 0], "negative": ["8", 1], "latent_image": ["3", 0], "seed": 5,
            "steps": STEPS, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        }  # fmt: skip
        native = {
            "n20": ("UNETLoader", {"unet_name": files.transformer, "weight_dtype": "default"}),
            "n21": ("VAELoader", {"vae_name": files.vae}),
        }
        return changed(
            {},
            n1=("QwenLowVRAMLoader", loader),
            n2=("QwenLowVRAMEncodePrompts", {"clip": ["1", 1], "positive": "a red circle", "negative": "blurry"}),
            n3=("EmptySD3LatentImage", {"width": 96, "height": 64, "batch_size": 2}),
            n4=("KSampler", sample),
            n7=("SaveLatent", {"samples": ["4", 0], "filename_prefix": "control"}),
            n8=("ControlNetApplyAdvanced", control),
            n9=("ControlNetLoader", {"control_net_name": "union.safetensors"}),
            n10=("LoadImage", {"image": "control.png"}),
            **({} if ours else native),
        )

    return make


def latents(server: ComfyServer, prompt: Prompt) -> torch.Tensor:
    (saved,) = ComfyClient(server.url).run(prompt).outputs["7"]["latents"]
    return load_file(server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]


def _inpaint(prompt: Prompt) -> Prompt:
    inputs = prompt["8"]["inputs"] | {"mask": ["10", 1]}
    return changed(
        prompt,
        "8",
        "9",
        n8=("ControlNetInpaintingAliMamaApply", inputs),
        n9=("ControlNetLoader", {"control_net_name": "inpaint.safetensors"}),
    )


def _diffsynth(prompt: Prompt) -> Prompt:
    sample = prompt["4"]["inputs"]
    patch = {"model": sample["model"], "model_patch": ["12", 0], "vae": prompt["8"]["inputs"]["vae"]}
    return changed(
        prompt,
        "8",
        "9",
        n4=("KSampler", sample | {"model": ["11", 0], "positive": ["2", 0], "negative": ["2", 1]}),
        n11=("QwenImageDiffsynthControlnet", patch | {"image": ["10", 0], "strength": 0.7}),
        n12=("ModelPatchLoader", {"name": "canny.safetensors"}),
    )


CHANGES: dict[str, Callable[[Prompt], Prompt]] = {
    "union": lambda prompt: prompt,
    "inpainting": _inpaint,
    "diffsynth": _diffsynth,
    "fun": lambda prompt: with_inputs(prompt, "9", control_net_name="fun.safetensors"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_controlled_graph_has_the_latents_of_comfyuis_own_loaders(
    change: str, server: ComfyServer, graph: Callable[[bool], Prompt]
) -> None:
    made, wanted = (latents(server, CHANGES[change](graph(ours))) for ours in (True, False))
    assert wanted.shape == (2, 16, 1, 8, 12)
    assert wanted.std() > 0.5
    assert (made - wanted).abs().max() < 1e-4
    uncontrolled = with_inputs(graph(True), "4", positive=["2", 0], negative=["2", 1])
    assert (made - latents(server, uncontrolled)).abs().max() > 0.01
    reports = server.log.split("MemoryReport: ")[1:]
    assert "ControlNets and model patches" in reports[-2]
    assert "one after another" not in reports[-2]


def test_a_controlnet_that_does_not_fit_is_refused_in_the_graph(
    server: ComfyServer, graph: Callable[[bool], Prompt]
) -> None:
    prompt = with_inputs(graph(True), "1", vram_limit_gb=0.01)
    with pytest.raises(ExecutionFailed, match="no ControlNet and no model patch"):
        latents(server, prompt)
