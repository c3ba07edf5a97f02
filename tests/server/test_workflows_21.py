"""The bundled graphs of Qwen-Image-2.1 through the real server make the images of diffusers' pipeline."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_files import quantized, read_dequantized
from devtools.client import ComfyClient, Run
from devtools.server import ComfyServer
from devtools.workflow import set_widgets, to_prompt
from edit_reference_21 import reference_images
from PIL import Image
from qwenimage_lowvram.engine.models.qwen_image_21.schedule import TURBO_SIGMAS
from safetensors.torch import load_file, save_file
from small_pipeline_21 import make_pipeline_21
from small_qwen3_vl import write_comfyui_file
from small_transformer_21 import joined
from small_vae_21 import write_file
from torch import Tensor

from .graphs import FOLDER, QWEN_IMAGE_21, Prompt, with_inputs

SEED, STEPS = 5, 3
TEXT_SIZE = {"width": 96, "height": 64}
RESOLUTION = 320  # whose square is the area of a shown image; smaller ones are enlarged for the encoder alone
SHOWN = {"width": 384, "height": 256}  # of that area: neither it nor the output is resampled
SAVED, OWN_PIXELS = "6", "14"  # nodes that save an image: the model's, and of 17 the file's own with the model's mask


@pytest.fixture(scope="module")
def photos(comfy_server: ComfyServer) -> list[str]:
    names = []
    for i in range(3):
        values = np.random.default_rng(i).integers(0, 255, (SHOWN["height"], SHOWN["width"], 3), dtype=np.uint8)
        names.append(f"shown-21-{i}.png")
        Image.fromarray(values).save(comfy_server.base / "input" / names[-1])
    return names


@pytest.fixture(scope="module")
def prompts(object_info: dict[str, Any], folders_21: dict[str, str], photos: list[str]) -> dict[str, Prompt]:
    """The graphs with the small files, small sizes, few steps and a seed; else as they are."""
    made = {}
    for path in QWEN_IMAGE_21:
        folder = folders_21["2.1-Turbo" if "Turbo" in path.stem else "2.1"]
        loader = {"transformer": folder, "text_encoder": FOLDER, "vae": FOLDER}
        made[path.stem] = small(path, object_info, loader, photos)
    return made


def small(path: Path, object_info: dict[str, Any], files: dict[str, str], photos: list[str]) -> Prompt:
    graph = json.loads(path.read_text(encoding="utf-8"))
    changes: dict[str, dict[str, Any]] = {
        "QwenLowVRAMLoader": {"dtype": "fp32", **files},
        "EmptySD3LatentImage": TEXT_SIZE,
        "QwenLowVRAMEncodeEditPrompt": {"megapixels": (RESOLUTION / 1024) ** 2},
        "QwenLowVRAMSample": {"seed": SEED, "steps": STEPS},  # which Turbo's preset overrides
    }
    for node, values in changes.items():
        graph = set_widgets(graph, object_info, node, **values)
    prompt = to_prompt(graph, object_info)
    loaders = [node for node in prompt.values() if node["class_type"] == "LoadImage"]
    for node, photo in zip(loaders, photos, strict=False):
        node["inputs"]["image"] = photo
    return prompt


@pytest.fixture(scope="module")
def wanted(
    prompts: dict[str, Prompt], comfy_server: ComfyServer, models_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """What diffusers makes of the graphs' texts and images."""
    work = tmp_path_factory.mktemp("wanted")
    cases = {}
    for name, prompt in prompts.items():
        (sample,) = inputs_of(prompt, "QwenLowVRAMSample")
        (texts,) = [*inputs_of(prompt, "QwenLowVRAMEncodePrompts"), *inputs_of(prompt, "QwenLowVRAMEncodeEditPrompt")]
        images = [node["image"] for node in inputs_of(prompt, "LoadImage")]
        for image in images:
            (work / image).write_bytes((comfy_server.base / "input" / image).read_bytes())
        case = {name: texts[name] for name in ("positive", "negative")} | {"images": images, "cfg": sample["cfg"]}
        case |= {"batch": 1, "seed": SEED, "steps": STEPS, "resolution": RESOLUTION}
        if "Turbo" in name:
            case["sigmas"] = list(TURBO_SIGMAS)
        cases[name] = case | (SHOWN if images else TEXT_SIZE)
    return reference_images(models_dir / "diffusers" / "small-2.1", work, cases)


def inputs_of(prompt: Prompt, kind: str) -> list[dict[str, Any]]:
    return [node["inputs"] for node in prompt.values() if node["class_type"] == kind]


def saved(client: ComfyClient, run: Run, node: str) -> Image.Image:
    (image,) = run.outputs[node]["images"]
    return Image.open(io.BytesIO(client.image(image)))


@pytest.mark.parametrize("name", [path.stem for path in QWEN_IMAGE_21])
def test_a_shipped_graph_makes_the_image_of_diffusers(
    name: str, client: ComfyClient, prompts: dict[str, Prompt], wanted: dict[str, Tensor]
) -> None:
    run = client.run(prompts[name])
    image = saved(client, run, SAVED)
    assert image.mode == "RGBA"
    expected = (255 * wanted[name][0]).clip(0, 255).to(torch.uint8).numpy().astype(int)
    assert expected.std() > 5
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1
    report = run.ui("qwen_lowvram_report")[0]
    assert report["steps"] == (len(TURBO_SIGMAS) if "Turbo" in name else STEPS)
    assert report["plan"]["request"]["branches"] == 1


def test_a_removed_background_leaves_the_files_own_pixels(
    client: ComfyClient, comfy_server: ComfyServer, prompts: dict[str, Prompt]
) -> None:
    """At the size of the file, which the model was not shown."""
    (name,) = (name for name in prompts if "background" in name)
    prompt: Prompt = json.loads(json.dumps(prompts[name]))
    (shown,) = inputs_of(prompt, "LoadImage")
    values = np.random.default_rng(9).integers(0, 255, (512, 768, 3), dtype=np.uint8)
    Image.fromarray(values).save(comfy_server.base / "input" / "large-21.png")
    shown["image"] = "large-21.png"
    run = client.run(prompt)
    cut, drawn = (np.asarray(saved(client, run, node)) for node in (OWN_PIXELS, SAVED))
    assert cut.shape == (512, 768, 4)
    assert np.array_equal(cut[..., :3], values)
    assert drawn.shape == (SHOWN["height"], SHOWN["width"], 4)
    assert drawn[..., 3].std() > 5
    alpha = torch.from_numpy(drawn[..., 3].astype(np.float32))[None, None]
    enlarged = torch.nn.functional.interpolate(alpha, size=(512, 768), mode="bilinear")[0, 0].numpy()
    assert np.abs(cut[..., 3] - enlarged).max() <= 2


@pytest.fixture(scope="module")
def published(models_dir: Path, comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Small files of ComfyUI's layout by the names that the graphs ask for, the transformer in the format of its name;
    its decoded weights lie beside it as plain-..."""
    folder = make_pipeline_21(tmp_path_factory.mktemp("published") / "2.1", comfyui=comfyui_path, whole_tokens=True)
    transformer, vae = (
        load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("transformer", "vae")
    )
    tensors = {}
    for name, weight in joined(transformer).items():
        if name.startswith("transformer_blocks.") and weight.ndim > 1:
            parts = quantized(weight.bfloat16(), "int8_convrot")
            tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
        else:
            tensors[name] = weight
    written = set()
    for path in QWEN_IMAGE_21:
        file, encoder, image_vae = loader_files(path)
        quantized_file, plain_file = (models_dir / "diffusion_models" / name for name in (file, f"plain-{file}"))
        save_file(tensors, quantized_file)
        save_file(read_dequantized(quantized_file), plain_file)
        text_file = write_comfyui_file(models_dir / "text_encoders" / encoder, folder / "text_encoder", torch.float32)
        written |= {quantized_file, plain_file, text_file, write_file(models_dir / "vae" / image_vae, vae)}
    yield
    for made in written:
        made.unlink()


def loader_files(path: Path) -> list[str]:
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    (files,) = (node["widgets_values"][:3] for node in nodes if node["type"] == "QwenLowVRAMLoader")
    return list(files)


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("path", QWEN_IMAGE_21[1:3], ids=lambda path: path.stem)
def test_the_files_that_a_graph_asks_for_make_the_image_of_their_decoded_weights(
    path: Path, client: ComfyClient, object_info: dict[str, Any], photos: list[str]
) -> None:
    prompt = small(path, object_info, {}, photos)
    run = client.run(prompt)
    report = run.ui("qwen_lowvram_report")[0]
    assert report["steps"] == (len(TURBO_SIGMAS) if "Turbo" in path.stem else STEPS)
    plain = client.run(with_inputs(prompt, "1", transformer=f"plain-{loader_files(path)[0]}"))
    image, expected = (np.asarray(saved(client, made, SAVED)).astype(int) for made in (run, plain))
    assert expected.std() > 5
    assert np.abs(image - expected).max() <= 1
