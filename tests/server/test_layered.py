"""Qwen-Image-Layered through the real server: the layers of diffusers' pipeline, in ComfyUI's own graph and in ours."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devtools.client import ComfyClient, ExecutionFailed
from devtools.server import ComfyServer
from devtools.workflow import set_widgets, to_prompt
from layered_reference import HEIGHT, WIDTH, layered_reference
from PIL import Image
from qwenimage_lowvram.engine.models.qwen_image_vae.latent_statistics import LATENTS_MEAN, LATENTS_STD
from safetensors.torch import load_file
from small_checkpoint import SplitFiles, write_split_files

from .graphs import FOLDER, LAYERED, Prompt, changed, with_inputs

PROMPT, NEGATIVE = "a cat, photo of the dog", "blurry"
LAYERS, STEPS, SEED, CFG = 3, 3, 5, 4.0


@pytest.fixture(scope="module")
def photo(comfy_server: ComfyServer) -> str:
    values = np.random.default_rng(0).integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    image = Image.fromarray(values).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    image.save(comfy_server.base / "input" / "layered.png")
    return "layered.png"


@pytest.fixture(scope="module")
def files(layered_pipeline: Path, layered_folder: str, models_dir: Path) -> SplitFiles:
    """Layered's split files; its folder lies beside the others."""
    return write_split_files(layered_pipeline, models_dir, dtype="fp32", name="qwen_image_layered")


def loader(transformer: str, text_encoder: str, vae: str) -> tuple[str, dict[str, Any]]:
    return "QwenLowVRAMLoader", {
        "transformer": transformer, "text_encoder": text_encoder, "vae": vae, "dtype": "fp32",
        "weight_format": "as stored", "vram_limit_gb": 0.0, "timesteps": "fp32", "positions": "diffusers",
    }  # fmt: skip


@pytest.fixture(scope="module")
def blueprint(comfyui_path: Path, object_info: Any) -> Prompt:
    """ComfyUI's own graph for layers, with what our loader, node 1, gives in the place of its three loaders."""
    file = comfyui_path / "blueprints" / "Image to Layers(Qwen-Image-Layered).json"
    (inside,) = json.loads(file.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    links = [link for link in inside["links"] if link["origin_id"] >= 0]  # others come from outside of it
    within = {link["id"] for link in links}
    for node in inside["nodes"]:
        for entry in node["inputs"]:
            entry["link"] = entry.get("link") if entry.get("link") in within else None
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    prompt = to_prompt({"nodes": inside["nodes"], "links": [[link[n] for n in names] for link in links]}, object_info)
    given = ("UNETLoader", "CLIPLoader", "VAELoader")
    slots = {node: given.index(entry["class_type"]) for node, entry in prompt.items() if entry["class_type"] in given}
    assert len(slots) == 3
    for entry in prompt.values():
        for name, value in entry["inputs"].items():
            if isinstance(value, list) and value[0] in slots:
                entry["inputs"][name] = ["1", slots[value[0]]]
    return changed(prompt, *slots)


@pytest.fixture
def graph(blueprint: Prompt, files: SplitFiles, layered_pipeline: Path, photo: str) -> Callable[..., Prompt]:
    """That graph: prompts 6 and 7, references 69 and 70, latent 83, sampler 3, cut 76, decoder 8; saved by 9 and 60."""

    def make(*, folder: bool = False, sampler: str = "native") -> Prompt:
        names = (f"{layered_pipeline.name} (folder)", FOLDER, FOLDER)
        prompt = changed(
            blueprint,
            n1=loader(*(names if folder else (files.transformer, files.text_encoder, files.vae))),
            n74=("LoadImage", {"image": photo}),
            n9=("SaveLatent", {"samples": ["3", 0], "filename_prefix": "layered"}),
            n60=("SaveImage", {"images": ["8", 0], "filename_prefix": "layered"}),
        )
        outside: dict[str, dict[str, Any]] = {
            "71": {"pixels": ["74", 0]},
            "78": {"image": ["74", 0]},
            "83": {"layers": LAYERS},
            "6": {"text": PROMPT},
            "7": {"text": NEGATIVE},
        }
        for node, inputs in outside.items():
            prompt = with_inputs(prompt, node, **inputs)
        if sampler == "native":
            return with_inputs(prompt, "3", seed=SEED, steps=STEPS, cfg=CFG)
        run = {
            "model": ["1", 0], "positive": ["69", 0], "negative": ["70", 0], "latent_image": ["83", 0], "cfg": CFG,
            "seed": SEED, "steps": STEPS, "denoise": 1.0, "sampler": "euler", "scheduler": "qwen_image",
            "norm_rescale": True,
        }  # fmt: skip
        return changed(prompt, n3=("QwenLowVRAMSample", run))

    return make


@pytest.fixture
def saved(client: ComfyClient, comfy_server: ComfyServer) -> Callable[[Prompt], tuple[torch.Tensor, torch.Tensor]]:
    """`saved(prompt)` -> the latents that its node 9 saves, and the images of its node 60 in 0..1."""

    def run(prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = client.run(prompt).outputs
        (latent,) = outputs["9"]["latents"]
        file = comfy_server.base / "output" / latent["subfolder"] / latent["filename"]
        opened = [Image.open(io.BytesIO(client.image(image))) for image in outputs["60"]["images"]]
        assert {image.mode for image in opened} == {"RGBA"}
        images = torch.stack([torch.from_numpy(np.array(image)) for image in opened])
        return load_file(file)["latent_tensor"], images.float() / 255

    return run


@pytest.mark.parametrize("folder", [False, True], ids=["files", "folder"])
def test_the_layers_are_those_of_diffusers(
    folder: bool,
    graph: Callable[..., Prompt],
    saved: Callable[[Prompt], tuple[torch.Tensor, torch.Tensor]],
    comfy_server: ComfyServer,
    layered_pipeline: Path,
    photo: str,
) -> None:
    latents, images = saved(graph(folder=folder, sampler="ours"))
    shape = (1, 16, LAYERS + 1, HEIGHT // 8, WIDTH // 8)
    made, layers = layered_reference(
        layered_pipeline,
        Image.open(comfy_server.base / "input" / photo),
        torch.randn(shape, generator=torch.Generator().manual_seed(SEED)),
        prompt=PROMPT,
        negative=NEGATIVE,
        cfg=CFG,
        steps=STEPS,
    )
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (LATENTS_MEAN, LATENTS_STD))
    wanted = made * std + mean
    assert latents.shape == shape
    assert wanted.std() > 0.5
    assert (latents - wanted).abs().max() < 1e-4
    assert images[1:].shape == layers.shape == (LAYERS, HEIGHT, WIDTH, 4)
    assert (images[1:] - layers).abs().max() < 1.01 / 255


def test_comfyuis_own_graph_runs_with_our_models_and_our_decoder_needs_no_cut(
    client: ComfyClient, graph: Callable[..., Prompt], saved: Callable[[Prompt], tuple[torch.Tensor, torch.Tensor]]
) -> None:
    latents, images = saved(graph())
    assert latents.shape[2] == LAYERS + 1
    assert images.std() > 0.01
    decode = ("QwenLowVRAMDecode", {"samples": ["3", 0], "vae": ["1", 2], "tile_size": 64})
    _, own = saved(changed(graph(), n8=decode))
    assert (own - images).abs().max() < 1.01 / 255


def test_text_alone_makes_layers_too(graph: Callable[..., Prompt], client: ComfyClient) -> None:
    prompt = with_inputs(graph(), "3", positive=["6", 0], negative=["7", 0])
    assert len(client.run(prompt).outputs["60"]["images"]) == LAYERS + 1


def test_an_image_of_any_size_is_taken_apart(
    client: ComfyClient, comfy_server: ComfyServer, graph: Callable[..., Prompt]
) -> None:
    Image.linear_gradient("L").resize((150, 90)).convert("RGB").save(comfy_server.base / "input" / "any.png")
    logged = len(comfy_server.log)
    run = client.run(with_inputs(graph(), "74", image="any.png"))
    (first, *_) = run.outputs["60"]["images"]
    assert Image.open(io.BytesIO(client.image(first))).size == (144, 88)
    assert "An image of 144x88 px is not a multiple of 16" in comfy_server.log[logged:]


@pytest.mark.parametrize("path", LAYERED, ids=lambda path: path.stem)
def test_the_shipped_graph_runs(
    client: ComfyClient, object_info: Any, files: SplitFiles, layered_pipeline: Path, photo: str, path: Path
) -> None:
    folder = {"transformer": f"{layered_pipeline.name} (folder)", "text_encoder": FOLDER, "vae": FOLDER}
    graph = json.loads(path.read_text(encoding="utf-8"))
    for node, values in {
        "QwenLowVRAMLoader": {**folder, "weight_format": "as stored"},
        "LoadImage": {"image": photo},
        "ImageScaleToTotalPixels": {"megapixels": 0.02},
        "QwenLowVRAMSample": {"steps": 2, "seed": SEED},
    }.items():
        graph = set_widgets(graph, object_info, node, **values)
    run = client.run(to_prompt(graph, object_info))
    request = run.ui("qwen_lowvram_report")[0]["plan"]["request"]
    width, height = request["width"], request["height"]
    assert (width % 32, height % 32, request["frames"]) == (0, 0, 5)
    images = [Image.open(io.BytesIO(client.image(image))) for image in run.images()]
    assert [(image.size, image.mode) for image in images] == [((width, height), "RGBA")] * 5


# bad input


def test_a_vae_of_the_other_kind_is_refused_before_anything_is_loaded(
    client: ComfyClient, graph: Callable[..., Prompt], files: SplitFiles, split_files: dict[str, SplitFiles]
) -> None:
    plain = split_files["bf16"]
    for given, words in (
        (loader(files.transformer, files.text_encoder, plain.vae), "Use qwen_image_layered_vae.safetensors"),
        (loader(plain.transformer, plain.text_encoder, files.vae), "Use qwen_image_vae.safetensors"),
    ):
        with pytest.raises(ExecutionFailed, match=f"vae: .*{words}"):
            client.run(changed(graph(), n1=given))


def test_graphs_for_the_other_kind_of_model_are_refused(
    client: ComfyClient, graph: Callable[..., Prompt], split_files: dict[str, SplitFiles]
) -> None:
    size = {"width": WIDTH, "height": HEIGHT, "batch_size": 1}
    with pytest.raises(ExecutionFailed, match="makes layers, but this graph's latent has none"):
        client.run(changed(graph(), n83=("EmptySD3LatentImage", size)))
    plain = split_files["bf16"]
    with pytest.raises(
        ExecutionFailed, match=rf"The latent has {LAYERS + 1} frames, but Qwen-Image makes a single image"
    ):
        client.run(changed(graph(), n1=loader(plain.transformer, plain.text_encoder, plain.vae)))
