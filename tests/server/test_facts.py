"""What the image shows, asked of the trained miniature through the real server: facts with a right answer."""

import io
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bnb_folder import write_quantized_pipeline
from devtools.client import ComfyClient
from devtools.server import ComfyServer
from miniature.data import Item, Scene, caption, paint
from miniature.scorer import score
from PIL import Image
from split_files import write_split_files

from .graphs import (
    FOLDER,
    IMAGE_TO_IMAGE,
    INPAINT,
    LIGHTNING,
    OUTPAINT,
    WORKFLOWS,
    changed,
    with_inputs,
    workflow,
    workflow_from_image,
)

MINIATURE = Path(__file__).parents[2] / "miniature"
# combinations that the miniature has been trained on: this asks whether the pack draws what the weights know
SCENES = [
    (Scene("white", (Item("circle", "red", "large"),), "centre"), "en"),
    (Scene("blue", (Item("square", "yellow", "large"),), "left"), "zh"),
]
SETTINGS = {"width": 128, "height": 128, "batch_size": 1}


@pytest.fixture(scope="module")
def loader(models_dir: Path) -> dict[str, Any]:
    """Inputs of the loader for the miniature as a pipeline folder."""
    target = models_dir / "diffusers" / "miniature"
    if not target.exists():
        shutil.copytree(MINIATURE, target)
    return {"transformer": "miniature (folder)", "text_encoder": FOLDER, "vae": FOLDER, "dtype": "fp32"}


def prompt_of(path: Path, object_info: Any, loader: dict[str, Any], scene: Scene, language: str) -> dict[str, Any]:
    text = caption(scene, language, random.Random(0))
    return workflow(
        path,
        object_info,
        loader,
        prompts={"positive": text, "negative": " "},
        size=SETTINGS,
        sample={"seed": 1, "steps": 20, "cfg": 4.0},
    )


def assert_shows(client: ComfyClient, prompt: dict[str, Any], scene: Scene) -> dict[str, Any]:
    run = client.run(prompt)
    image = np.asarray(Image.open(io.BytesIO(client.image(run.images()[0]))).convert("RGB"))
    verdict = score(image, scene)
    assert verdict.correct, verdict
    report: dict[str, Any] = run.ui("qwen_lowvram_report")[0]
    return report


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("scene", "language"), SCENES, ids=["English", "Chinese"])
def test_every_bundled_workflow_shows_what_its_prompt_says(
    client: ComfyClient, object_info: Any, loader: dict[str, Any], path: Path, scene: Scene, language: str
) -> None:
    assert_shows(client, prompt_of(path, object_info, loader, scene, language), scene)


def test_every_plan_shows_it(client: ComfyClient, object_info: Any, loader: dict[str, Any]) -> None:
    scene, language = SCENES[0]
    plan = assert_shows(client, prompt_of(WORKFLOWS[0], object_info, loader, scene, language), scene)["plan"]
    block_bytes = plan["resident_bytes"] // plan["blocks"]
    seen = {len(plan["resident"])}
    for quarters in range(1, 4 * plan["blocks"]):
        if 0 in seen:
            break
        limit_gb = (plan["sampling_peak_bytes"] - quarters / 4 * block_bytes) / 1024**3
        prompt = prompt_of(WORKFLOWS[0], object_info, loader | {"vram_limit_gb": limit_gb}, scene, language)
        seen.add(len(assert_shows(client, prompt, scene)["plan"]["resident"]))
    assert {0, plan["blocks"]} < seen  # and what lies between: two slots may be worth more than a block


def test_tiles_show_it(client: ComfyClient, object_info: Any, loader: dict[str, Any]) -> None:
    scene, language = SCENES[0]
    prompt = with_inputs(prompt_of(WORKFLOWS[0], object_info, loader, scene, language), "5", tile_size=64)
    assert_shows(client, prompt, scene)


@pytest.mark.parametrize("scene", SCENES, ids=["English", "Chinese"])
@pytest.mark.parametrize("weight_format", ["as stored", "int8"])
def test_four_steps_with_a_lightning_lora_show_it(
    client: ComfyClient,
    object_info: Any,
    loader: dict[str, Any],
    models_dir: Path,
    scene: tuple[Scene, str],
    weight_format: str,
) -> None:
    (models_dir / "loras").mkdir(exist_ok=True)
    shutil.copy(MINIATURE / "lightning-4steps.safetensors", models_dir / "loras")
    prompt = prompt_of(LIGHTNING[0], object_info, loader | {"weight_format": weight_format}, *scene)
    prompt = with_inputs(prompt, "4", preset="Lightning, 4 steps")
    prompt = with_inputs(prompt, "8", lora_name="lightning-4steps.safetensors", strength=1.0)
    report = assert_shows(client, prompt, scene[0])
    assert report["steps"] == report["passes"] == 4
    assert report["plan"]["request"]["branches"] == 1
    shutil.rmtree(models_dir / "qwen_lowvram", ignore_errors=True)


@pytest.mark.parametrize(
    ("storage", "held"),
    [
        ("bf16", "bf16"),
        ("fp16", "fp16"),
        ("fp8", "fp8_e4m3fn"),
        ("fp8_scaled", "fp8_e4m3fn_scaled"),
        ("fp8mixed", "fp8_e4m3fn_scaled"),
        ("int8", "int8"),
        ("int8_convrot", "int8_convrot"),
        ("gguf_q8_0", "gguf_q8_0"),
        ("gguf_q5_1", "gguf_q5_1"),
    ],
)
def test_every_weight_format_shows_it(
    client: ComfyClient, object_info: Any, loader: dict[str, Any], models_dir: Path, storage: str, held: str
) -> None:
    # the miniature's own small vocabulary lies in the folder, so the prompts are encoded by the folder's CLIP
    files = write_split_files(MINIATURE, models_dir, dtype=storage, name="miniature")
    scene, language = SCENES[0]
    prompt = prompt_of(WORKFLOWS[0], object_info, loader, scene, language)
    split = loader | {"transformer": files.transformer, "text_encoder": files.text_encoder, "vae": files.vae}
    inputs = {**prompt["1"]["inputs"], **split}
    prompt = changed(prompt, n10=("QwenLowVRAMLoader", inputs))
    prompt = with_inputs(with_inputs(prompt, "4", model=["10", 0]), "5", vae=["10", 2])
    report = assert_shows(client, prompt, scene)
    assert report["weight_format"].startswith(held)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_folders_of_bitsandbytes_show_it(
    client: ComfyClient, object_info: Any, loader: dict[str, Any], models_dir: Path, kind: str
) -> None:
    options = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    write_quantized_pipeline(MINIATURE, models_dir / "diffusers" / f"miniature-{kind}", **options)
    scene, language = SCENES[0]
    folder = loader | {"transformer": f"miniature-{kind} (folder)"}
    report = assert_shows(client, prompt_of(WORKFLOWS[0], object_info, folder, scene, language), scene)
    assert report["weight_format"] == {"int8": "bnb_int8"}.get(kind, kind)


@pytest.mark.parametrize("weight_format", ["fp8_e4m3fn_scaled", "int8", "nf4", "fp4"])
def test_weights_quantized_on_load_show_it(
    client: ComfyClient, object_info: Any, loader: dict[str, Any], models_dir: Path, weight_format: str
) -> None:
    scene, language = SCENES[0]
    quantized = loader | {"weight_format": weight_format}
    report = assert_shows(client, prompt_of(WORKFLOWS[0], object_info, quantized, scene, language), scene)
    assert report["weight_format"].endswith(weight_format)
    shutil.rmtree(models_dir / "qwen_lowvram")  # other tests count what lies there


# from an image


CIRCLE, SQUARE = Item("circle", "red", "large"), Item("square", "blue", "large")
ONE, BOTH = Scene("white", (CIRCLE,), "left"), Scene("white", (CIRCLE, SQUARE), "left")
HALF = 64  # of the image's width


@pytest.fixture
def start(comfy_server: ComfyServer) -> np.ndarray:
    """A circle in the left half; "circle.png" has the right half painted over in the MaskEditor, "half.png" lacks
    it."""
    image = paint(ONE, random.Random(0))
    alpha = np.full((128, 128, 1), 255, dtype=np.uint8)
    alpha[:, HALF + 4 :] = 0
    Image.fromarray(np.concatenate([image, alpha], axis=2)).save(comfy_server.base / "input" / "circle.png")
    Image.fromarray(image[:, :HALF]).save(comfy_server.base / "input" / "half.png")
    return image


def from_image(path: Path, object_info: Any, loader: dict[str, Any], image: str, scene: Scene) -> dict[str, Any]:
    prompts = {"positive": caption(scene, "en", random.Random(0)), "negative": " "}
    sample = {"seed": 1, "steps": 20, "cfg": 4.0}
    return workflow_from_image(path, object_info, loader, image, prompts=prompts, sample=sample)


def shown(client: ComfyClient, prompt: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(client.image(client.run(prompt).images()[0]))).convert("RGB"))


@pytest.mark.parametrize("sampler", ["Sample", "KSampler"])
@pytest.mark.parametrize(("path", "image"), [(INPAINT, "circle.png"), (OUTPAINT, "half.png")], ids=str)
def test_a_shape_is_drawn_into_the_part_that_is_made_anew_and_the_rest_stays(
    path: Path,
    image: str,
    sampler: str,
    client: ComfyClient,
    object_info: Any,
    loader: dict[str, Any],
    start: np.ndarray,
) -> None:
    prompt = from_image(path, object_info, loader, image, BOTH)
    if sampler == "KSampler":
        own = ("sampler", "scheduler", "norm_rescale", "preset")
        kept = {name: value for name, value in prompt["4"]["inputs"].items() if name not in own}
        prompt = changed(prompt, n4=("KSampler", {**kept, "sampler_name": "euler", "scheduler": "simple"}))
    made = shown(client, prompt)
    assert made.shape == start.shape
    assert (made[:, : HALF - 4] == start[:, : HALF - 4]).all()
    verdict = score(made, BOTH)
    assert verdict.correct, verdict


@pytest.mark.parametrize("size", ["large", "small"])
def test_image_to_image_keeps_the_size_and_place_of_a_shape_and_takes_the_colour_of_the_prompt(
    size: str, client: ComfyClient, comfy_server: ComfyServer, object_info: Any, loader: dict[str, Any]
) -> None:
    blue = Scene("white", (Item("circle", "blue", None),), "left")  # of which size, only the image says
    seen = []
    for chance in range(2):
        image = paint(Scene("white", (Item("circle", "red", size),), "left"), random.Random(chance))
        Image.fromarray(image).save(comfy_server.base / "input" / f"{size}{chance}.png")
        made = shown(client, from_image(IMAGE_TO_IMAGE, object_info, loader, f"{size}{chance}.png", blue))
        verdict = score(made, blue)
        assert verdict.correct, verdict
        ((found,), (given,)) = verdict.found, score(image, blue).found
        assert found.size == given.size == size
        assert abs(found.x - given.x) < 0.015
        assert abs(found.y - given.y) < 0.015
        seen.append(given)
    assert seen[0].x - seen[1].x > 0.02  # places that the prompt does not tell apart
