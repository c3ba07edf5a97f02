"""Editing graphs through the real server: our nodes make the latents of diffusers' pipeline, and ComfyUI's own text
nodes work with our models."""

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
from edit_reference import FIRST_HEIGHT, FIRST_WIDTH, HEIGHT, WIDTH, edit_pipeline, edit_plus_pipeline
from PIL import Image
from qwenimage_lowvram.engine.models.qwen_image.latents import unpack
from qwenimage_lowvram.engine.models.qwen_image_vae.latent_statistics import LATENTS_MEAN, LATENTS_STD
from safetensors.torch import load_file

from .graphs import EDITING, FOLDER, Prompt, changed, with_inputs

PROMPT, NEGATIVE = "make the dog red", "blurry"
STEPS, SEED, CFG = 3, 5, 4.0
MEGAPIXELS = WIDTH * HEIGHT / 1024**2
EDIT, EDIT_2509, EDIT_2511 = "Qwen-Image-Edit", "Qwen-Image-Edit-2509", "Qwen-Image-Edit-2511"


@pytest.fixture(scope="module")
def photos(comfy_server: ComfyServer) -> list[str]:
    """Upright, lying and upright images of the size that diffusers does not resample, and one of another size."""
    names = []
    for i, (width, height) in enumerate([(WIDTH, HEIGHT), (HEIGHT, WIDTH), (WIDTH, HEIGHT), (1000, 700)]):
        values = np.random.default_rng(i).integers(0, 255, (height // 7, width // 7, 3), dtype=np.uint8)
        image = Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
        names.append(f"edit{i}.png")
        image.save(comfy_server.base / "input" / names[-1])
    return names


@pytest.fixture(scope="module")
def opened(photos: list[str], comfy_server: ComfyServer) -> list[Image.Image]:
    return [Image.open(comfy_server.base / "input" / name).convert("RGB") for name in photos]


@pytest.fixture
def graph(full_pipeline: Path, photos: list[str], models_dir: Path) -> Callable[..., Prompt]:
    """`graph(variant, 0, 1)` -> loader 1, edit prompt 2, sampler 4, decoder 5, saved latent 7, images 10 and on."""

    def make(variant: str, *shown: int, **inputs: Any) -> Prompt:
        loader = {
            "transformer": f"{full_pipeline.name} (folder)", "text_encoder": FOLDER, "vae": FOLDER, "dtype": "fp32",
            "weight_format": "as stored", "vram_limit_gb": 0.0, "timesteps": "fp32", "variant": variant,
            "positions": "diffusers",
        }  # fmt: skip
        edit = {
            "clip": ["1", 1], "vae": ["1", 2], "positive": PROMPT, "negative": NEGATIVE, "megapixels": MEGAPIXELS,
            "width": 0, "height": 0, "batch_size": 1, "variant": "auto",
            **{f"image{i + 1}": [str(10 + i), 0] for i in range(len(shown))},
        }  # fmt: skip
        sample = {
            "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 1], "latent_image": ["2", 2], "seed": SEED,
            "steps": STEPS, "cfg": CFG, "sampler": "euler", "scheduler": "qwen_image", "denoise": 1.0,
            "norm_rescale": True,
        }  # fmt: skip
        return changed(
            {},
            n1=("QwenLowVRAMLoader", loader),
            n2=("QwenLowVRAMEncodeEditPrompt", edit | inputs),
            n4=("QwenLowVRAMSample", sample),
            n5=("QwenLowVRAMDecode", {"samples": ["4", 0], "vae": ["1", 2], "tile_size": 0}),
            n6=("SaveImage", {"images": ["5", 0], "filename_prefix": "edit"}),
            n7=("SaveLatent", {"samples": ["4", 0], "filename_prefix": "edit"}),
            **{f"n{10 + i}": ("LoadImage", {"image": photos[number]}) for i, number in enumerate(shown)},
        )

    return make


@pytest.fixture
def latents(client: ComfyClient, comfy_server: ComfyServer) -> Callable[[Prompt], torch.Tensor]:
    """`latents(prompt)` -> what its node 7 saves, (1, 16, 1, h, w)."""

    def run(prompt: Prompt) -> torch.Tensor:
        (saved,) = client.run(prompt).outputs["7"]["latents"]
        file = comfy_server.base / "output" / saved["subfolder"] / saved["filename"]
        return load_file(file)["latent_tensor"]

    return run


def reference(
    pipeline: Any, images: Any, *, width: int = WIDTH, height: int = HEIGHT, steps: int = STEPS
) -> torch.Tensor:
    """The latents of diffusers' pipeline as ComfyUI has them."""
    made = pipeline(
        image=images,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        true_cfg_scale=CFG,
        width=width,
        height=height,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (LATENTS_MEAN, LATENTS_STD))
    return unpack(made, height // 8, width // 8) * std + mean


@pytest.mark.parametrize(
    ("variant", "shown"),
    [(EDIT_2509, [0]), (EDIT_2509, [1, 0]), (EDIT_2509, [0, 1, 2]), (EDIT_2511, [0]), (EDIT_2511, [0, 1])],
    ids=str,
)
def test_an_edit_has_the_latents_of_diffusers(
    variant: str,
    shown: list[int],
    graph: Callable[..., Prompt],
    latents: Callable[[Prompt], torch.Tensor],
    opened: list[Image.Image],
    full_pipeline: Path,
) -> None:
    ours = latents(graph(variant, *shown))
    images = [opened[number] for number in shown]
    pipeline = edit_plus_pipeline(full_pipeline, zero_cond_t=variant == EDIT_2511)
    wanted = reference(pipeline, images, width=images[0].width, height=images[0].height)
    assert ours.shape == wanted.shape
    assert wanted.std() > 0.5
    assert (ours - wanted).abs().max() < 1e-4


def test_an_edit_by_the_first_model_has_the_latents_of_diffusers(
    graph: Callable[..., Prompt],
    latents: Callable[[Prompt], torch.Tensor],
    opened: list[Image.Image],
    full_pipeline: Path,
    comfy_server: ComfyServer,
) -> None:
    """At the real size of the image, which nothing can change; the output is smaller."""
    shown = opened[0].resize((FIRST_WIDTH, FIRST_HEIGHT), Image.Resampling.BILINEAR)
    shown.save(comfy_server.base / "input" / "first.png")
    prompt = graph(EDIT, 0, megapixels=1.0, width=WIDTH, height=HEIGHT)
    prompt = with_inputs(with_inputs(prompt, "10", image="first.png"), "4", steps=2)
    ours = latents(prompt)
    wanted = reference(edit_pipeline(full_pipeline), shown, steps=2)
    assert ours.shape == wanted.shape
    assert wanted.std() > 0.5
    assert (ours - wanted).abs().max() < 1e-4


def test_images_change_the_result_each(graph: Callable[..., Prompt], latents: Callable[[Prompt], torch.Tensor]) -> None:
    results = [latents(graph(EDIT_2509, *shown)) for shown in ([0], [2], [0, 1], [0, 2])]
    results.append(latents(graph(EDIT_2511, 0)))
    for i, one in enumerate(results):
        for other in results[:i]:
            assert (one - other).abs().mean() > 1e-3


def test_an_image_of_any_size_comes_out_on_the_grid_that_the_node_tells(
    client: ComfyClient, graph: Callable[..., Prompt]
) -> None:
    run = client.run(graph(EDIT_2509, 3, megapixels=0.05))
    assert run.ui("text") == ["output 288x192\nimage 1: 1000x700 to 288x192, 5.0% wider, seen at 448x308"]
    (saved,) = run.outputs["6"]["images"]
    assert Image.open(io.BytesIO(client.image(saved))).size == (288, 192)


def test_without_an_image_it_draws(client: ComfyClient, graph: Callable[..., Prompt]) -> None:
    run = client.run(graph(EDIT_2509, width=96, height=64))
    assert run.ui("text") == ["output 96x64"]
    assert run.images()


# ComfyUI's own nodes


def native(prompt: Prompt, node: str, *images: str) -> Prompt:
    """The graph with ComfyUI's text node for each prompt, an empty latent of 224x672 and KSampler."""
    names = ["image"] if node == "TextEncodeQwenImageEdit" else ["image1", "image2", "image3"]
    shown = {name: [image, 0] for name, image in zip(names, images, strict=False)}
    own = {"clip": ["1", 1], "vae": ["1", 2], **shown}
    size = {"width": WIDTH, "height": HEIGHT, "batch_size": 1}
    sample = {
        "model": ["1", 0], "positive": ["20", 0], "negative": ["21", 0], "latent_image": ["22", 0], "seed": SEED,
        "steps": 1, "cfg": CFG, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    return changed(
        prompt,
        "2",
        n20=(node, own | {"prompt": PROMPT}),
        n21=(node, own | {"prompt": NEGATIVE}),
        n22=("EmptySD3LatentImage", size),
        n4=("KSampler", sample),
    )


@pytest.mark.parametrize("node", ["TextEncodeQwenImageEdit", "TextEncodeQwenImageEditPlus"])
def test_comfyuis_text_nodes_edit_with_our_models(
    node: str, client: ComfyClient, comfy_server: ComfyServer, graph: Callable[..., Prompt]
) -> None:
    logged = len(comfy_server.log)
    run = client.run(native(graph(EDIT_2509, 3), node, "10"))
    (saved,) = run.outputs["6"]["images"]
    assert Image.open(io.BytesIO(client.image(saved))).size == (WIDTH, HEIGHT)
    # 1000x700 becomes 1224x856 or 1224x857 there, which no patches cover
    assert "A reference image of 1224x856 px is not a multiple of 16" in comfy_server.log[logged:]


def test_our_node_conditions_comfyuis_samplers(
    graph: Callable[..., Prompt], latents: Callable[[Prompt], torch.Tensor]
) -> None:
    prompt = graph(EDIT_2509, 0, 1)
    plain = with_inputs(prompt, "4", scheduler="simple", norm_rescale=False)
    settings = {**plain["4"]["inputs"], "sampler_name": "euler"}
    kept = {name: value for name, value in settings.items() if name not in ("sampler", "norm_rescale")}
    assert torch.equal(latents(changed(plain, n4=("KSampler", kept))), latents(plain))


# bad input


def test_an_edit_model_without_an_image_in_a_text_graph_names_the_node_to_use(
    client: ComfyClient, graph: Callable[..., Prompt]
) -> None:
    texts = {"clip": ["1", 1], "positive": PROMPT, "negative": NEGATIVE}
    prompt = changed(
        graph(EDIT_2509),
        n2=("QwenLowVRAMEncodePrompts", texts),
        n3=("EmptySD3LatentImage", {"width": 64, "height": 64, "batch_size": 1}),
    )
    with pytest.raises(ExecutionFailed, match=r"gives it none(.|\n)*'Encode Edit Prompt \(low VRAM\)'"):
        client.run(with_inputs(prompt, "4", latent_image=["3", 0]))


def test_comfyuis_text_node_without_an_image_is_refused_too(client: ComfyClient, graph: Callable[..., Prompt]) -> None:
    with pytest.raises(ExecutionFailed, match=r"gives it none(.|\n)*'Encode Edit Prompt \(low VRAM\)'"):
        client.run(native(graph(EDIT_2509), "TextEncodeQwenImageEditPlus"))


def test_a_text_model_that_is_shown_an_image_is_warned_of(
    client: ComfyClient, comfy_server: ComfyServer, graph: Callable[..., Prompt]
) -> None:
    logged = len(comfy_server.log)
    run = client.run(graph("Qwen-Image", 0, megapixels=0.01))
    assert run.images()
    assert any(b"Qwen-Image is given an image to edit" in message for message in run.previews)
    assert "Qwen-Image is given an image to edit, which it was not trained for" in comfy_server.log[logged:]


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_a_file_of_any_kind_is_edited_as_its_colours_alone(
    mode: str,
    graph: Callable[..., Prompt],
    latents: Callable[[Prompt], torch.Tensor],
    opened: list[Image.Image],
    comfy_server: ComfyServer,
) -> None:
    """Load Image drops transparency and repeats grey; it rounds grey otherwise than the converted image."""
    shown = opened[0].resize((96, 128)).convert(mode)
    if mode == "RGBA":
        shown.putalpha(Image.linear_gradient("L").resize(shown.size))
    results = []
    for name, image in ((f"{mode}.png", shown), (f"{mode}-plain.png", shown.convert("RGB"))):
        image.save(comfy_server.base / "input" / name)
        results.append(latents(with_inputs(graph(EDIT_2509, 0, megapixels=0.0), "10", image=name)))
    difference = (results[0] - results[1]).abs()
    assert difference.mean() < (0.02 * results[1].std() if mode == "L" else 1e-6)


def test_a_transparent_image_and_a_batch_of_four_are_named(client: ComfyClient, graph: Callable[..., Prompt]) -> None:
    mask = ("SolidMask", {"value": 1.0, "width": 1000, "height": 700})
    joined = ("JoinImageWithAlpha", {"image": ["10", 0], "alpha": ["30", 0]})
    clear = changed(graph(EDIT_2509, 3, image1=["31", 0]), n30=mask, n31=joined)
    with pytest.raises(ExecutionFailed, match=r"Image 1 \(1000x700 px\) has 4 channels, with transparency"):
        client.run(clear)
    four = changed(graph(EDIT_2509, 3, image1=["31", 0]), n31=("RepeatImageBatch", {"image": ["10", 0], "amount": 4}))
    with pytest.raises(ExecutionFailed, match="Image 1 is a batch of 4 images; one is needed"):
        client.run(four)
    tiny = changed(
        graph(EDIT_2509, image1=["31", 0]),
        n31=("EmptyImage", {"width": 1, "height": 1, "batch_size": 1, "color": 0}),
    )
    with pytest.raises(ExecutionFailed, match="Image 1 is 1x1 px; each side needs at least 16 px"):
        client.run(tiny)


@pytest.mark.parametrize("path", EDITING, ids=lambda path: path.stem)
def test_a_shipped_edit_graph_runs(
    client: ComfyClient, object_info: Any, full_pipeline: Path, photos: list[str], edit_loras: set[str], path: Path
) -> None:
    folder = {"transformer": f"{full_pipeline.name} (folder)", "text_encoder": FOLDER, "vae": FOLDER}
    graph = json.loads(path.read_text(encoding="utf-8"))
    variant = EDIT_2511 if "2511" in path.stem else EDIT_2509
    graph = set_widgets(graph, object_info, "QwenLowVRAMLoader", **folder, variant=variant)
    graph = set_widgets(graph, object_info, "QwenLowVRAMEncodeEditPrompt", megapixels=MEGAPIXELS)
    graph = set_widgets(graph, object_info, "LoadImage", image=photos[0])
    graph = set_widgets(graph, object_info, "QwenLowVRAMSample", seed=SEED)
    run = client.run(to_prompt(graph, object_info))
    image = Image.open(io.BytesIO(client.image(run.images()[0])))
    assert image.size == (WIDTH, HEIGHT)
    report = run.ui("qwen_lowvram_report")[0]
    assert report["steps"] == report["passes"] == 4  # Lightning's, without guidance
    tokens = report["plan"]["request"]["reference_tokens"]
    assert tokens == (3 if "three" in path.stem else 1) * WIDTH * HEIGHT // 16**2
