"""Qwen-Image-2.1 through the nodes: from the loader to the image, against diffusers' own pipeline of the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from edit_reference_21 import reference_images
from PIL import Image
from qwenimage_lowvram.engine.errors import InvalidRequest, WrongModel
from torch import Tensor

from .conftest import NAME_21

RESOLUTION = 320  # whose square is the area of a reference; smaller ones are enlarged for the encoder alone
MEGAPIXELS = (RESOLUTION / 1024) ** 2
SIZES = [(384, 256), (320, 320), (256, 384)]  # (width, height) of images; the output's is the first's
BASE = {"positive": "make <image1> red", "negative": "blurry", "cfg": 1.0, "steps": 4, "seed": 5, "batch": 1}
CASES: dict[str, dict[str, Any]] = {
    "text": {"images": 0, "positive": 'a sign that says "红色"', "cfg": 3.0, "width": 96, "height": 128},
    "text, no prompt, two": {"images": 0, "positive": "", "batch": 2, "width": 64, "height": 64},
    "one image": {"images": 1},
    "one transparent image, guided": {"images": 1, "alpha": True, "cfg": 4.0},
    "two images": {"images": 2, "batch": 2},
    "three images, guided": {"images": 3, "cfg": 3.0, "negative": ""},
    "three images, one transparent": {"images": 3, "alpha": True},
}


def image_of(index: int, alpha: bool) -> Image.Image:
    width, height = SIZES[index]
    channels = 4 if alpha else 3
    generator = torch.Generator().manual_seed(index)
    levels = torch.randint(0, 256, (height, width, channels), generator=generator, dtype=torch.uint8)
    return Image.fromarray(levels.numpy(), "RGBA" if alpha else "RGB")


def images_of(case: dict[str, Any]) -> list[Image.Image]:
    return [image_of(i, bool(case.get("alpha")) and i == 0) for i in range(case["images"])]


def pixels_of(image: Image.Image) -> Tensor:
    """As LoadImage gives it, alpha included."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(1, image.height, image.width, -1).float() / 255


@pytest.fixture(scope="module")
def wanted(diffusers_21: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What diffusers makes."""
    folder = tmp_path_factory.mktemp("wanted")
    cases = {}
    for number, (name, case) in enumerate(CASES.items()):
        settings = {**BASE, "width": SIZES[0][0], "height": SIZES[0][1], "resolution": RESOLUTION, **case}
        files = []
        for i, image in enumerate(images_of(case)):
            image.save(folder / f"{number}-{i}.png")
            files.append(f"{number}-{i}.png")
        cases[name] = {**settings, "images": files}
    return reference_images(diffusers_21 / NAME_21, folder, cases)


@pytest.fixture
def load(diffusers_21: Path, models: Any) -> Any:
    models("diffusers", str(diffusers_21))

    def of(**options: Any) -> Any:
        from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

        choices = {"transformer": f"{NAME_21} (folder)", "text_encoder": "from the folder", "vae": "from the folder"}
        settings = {"dtype": "fp32", "weight_format": "auto", "vram_limit_gb": 0.0, "timesteps": "fp32"}
        return QwenLowVRAMLoader().load(**{**choices, **settings, **options})

    return of


def encode(clip: Any, vae: Any, case: dict[str, Any], **options: Any) -> Any:
    from qwenimage_lowvram.nodes.encode_edit import QwenLowVRAMEncodeEditPrompt

    images = {f"image{i + 1}": pixels_of(image) for i, image in enumerate(images_of(case))}
    size = {"width": case.get("width", 0), "height": case.get("height", 0)}
    settings = {"megapixels": MEGAPIXELS, "variant": "auto", "batch_size": case.get("batch", 1), **size, **options}
    prompts = {name: case.get(name, BASE[name]) for name in ("positive", "negative")}
    return QwenLowVRAMEncodeEditPrompt().encode(clip, vae, **prompts, **settings, **images)["result"]


def make(model: Any, clip: Any, vae: Any, case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    from qwenimage_lowvram.nodes.decode import QwenLowVRAMDecode
    from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

    positive, negative, latent = encode(clip, vae, case)
    settings = {"seed": BASE["seed"], "steps": BASE["steps"], "cfg": case.get("cfg", BASE["cfg"]), "denoise": 1.0}
    settings |= {"sampler": "euler", "scheduler": "qwen_image", "norm_rescale": True}
    sampled = QwenLowVRAMSample().sample(model, positive, negative, latent, **settings)["result"][0]
    return QwenLowVRAMDecode().decode(sampled, vae, 0)


@pytest.mark.parametrize("name", CASES)
def test_an_image_is_that_of_the_reference(wanted: dict[str, Tensor], load: Any, name: str) -> None:
    images, mask = make(*load(), CASES[name])
    assert images.shape == wanted[name].shape
    assert wanted[name].std() > 0.05
    assert (images - wanted[name]).abs().max() < 1e-4
    assert torch.equal(mask, 1 - images[..., 3])


def test_a_limit_changes_nothing_and_is_kept(load: Any) -> None:
    import comfy.model_management

    case = CASES["one image"]
    model, clip, vae = load()
    whole = make(model, clip, vae, case)[0]
    least = model.model.last_report.plan.peak_bytes - 3 * model.model.transformer.footprint.slot_bytes
    comfy.model_management.unload_all_models()
    tight, *others = load(vram_limit_gb=least / 1024**3)
    others[1].limit_bytes = None  # the VAE takes more than so small a transformer
    assert torch.equal(make(tight, *others, case)[0], whole)
    plan = tight.model.last_report.plan
    assert len(plan.resident) < len(model.model.last_report.plan.resident)
    assert plan.peak_bytes <= plan.limit_bytes


def test_a_text_node_of_comfyuis_reads_the_clip(load: Any) -> None:
    """As TextEncodeQwenImage21 calls it: a prompt with images, whose places it hands on to the sampler."""
    _, clip, vae = load()
    case = CASES["two images"]
    images = [pixels_of(image) for image in images_of(case)]
    ours = encode(clip, vae, case)[0][0][1]
    from qwenimage_lowvram.engine.models.qwen3_vl.vision_patches import resize_image

    seen = [resize_image(images[0], 384, 256), resize_image(images[1], 320, 320)]
    tokens = clip.tokenize(BASE["positive"], images=seen, keep_vision=False, prevent_empty_text=True)
    (cond, values), *_ = clip.encode_from_tokens_scheduled(tokens)
    assert values["image_slots"] == ours["image_slots"]
    kept = clip.encode_from_tokens_scheduled(clip.tokenize(BASE["positive"], images=seen, keep_vision=True))
    assert kept[0][0].shape[1] == cond.shape[1] + sum(image.shape[1] * image.shape[2] // 32**2 for image in seen)
    assert "image_slots" not in kept[0][1]


def test_the_parts_of_other_models_are_named_at_their_inputs(
    load: Any, models: Any, small_pipeline: Path, tmp_path: Path
) -> None:
    (tmp_path / "encoders").mkdir()
    (tmp_path / "encoders" / "old.safetensors").symlink_to(small_pipeline / "text_encoder" / "model.safetensors")
    (tmp_path / "vaes").mkdir()
    old_vae = small_pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "vaes" / "old_vae.safetensors").symlink_to(old_vae)
    models("text_encoders", str(tmp_path / "encoders"))
    models("vae", str(tmp_path / "vaes"))
    with pytest.raises(WrongModel, match=r"^text_encoder: .*old.safetensors is .*; a Qwen3-VL text encoder is needed"):
        load(text_encoder="old.safetensors")
    with pytest.raises(WrongModel, match=r"^vae: .*old_vae.safetensors is another model's VAE"):
        load(vae="old_vae.safetensors")
    with pytest.raises(InvalidRequest, match=r"^variant: The variant Qwen-Image-Edit was chosen"):
        load(variant="Qwen-Image-Edit")


@pytest.mark.parametrize(("size", "edited"), [((64, 64), (64, 64)), ((100, 70), (96, 64)), ((384, 256), (384, 256))])
def test_an_image_keeps_its_own_size_where_a_person_asks_for_it_however_small(
    load: Any, size: tuple[int, int], edited: tuple[int, int]
) -> None:
    from qwenimage_lowvram.nodes.encode_edit import QwenLowVRAMEncodeEditPrompt

    _, clip, vae = load()
    settings = {"positive": "", "negative": "", "width": 0, "height": 0, "batch_size": 1, "variant": "auto"}
    image = torch.rand(1, *size[::-1], 3)
    made = QwenLowVRAMEncodeEditPrompt().encode(clip, vae, **settings, megapixels=0.0, image1=image)
    positive, _, latent = made["result"]
    (reference,) = positive[0][1]["reference_latents"]
    assert [16 * side for side in reference.shape[-2:]] == list(edited[::-1])
    assert latent["samples"].shape[-2:] == reference.shape[-2:]


def test_more_than_twelve_images_and_other_requests_are_refused(load: Any) -> None:
    _, clip, vae = load()
    with pytest.raises(InvalidRequest, match=r"Image 1 would be shown to Qwen-Image-2.1 at 160x96 px"):
        encode(clip, vae, CASES["one image"], megapixels=0.015)
    with pytest.raises(InvalidRequest, match=r"sides must be multiples of 32 px. Use 96x"):
        encode(clip, vae, {**CASES["one image"], "width": 104, "height": 96})
    with pytest.raises(InvalidRequest, match=r"half a token|multiples of 32"):
        encode(clip, vae, {**CASES["one image"], "width": 96, "height": 112})


def test_memory_plan_shows_every_stage_of_it(load: Any) -> None:
    from qwenimage_lowvram.nodes.memory_plan import QwenLowVRAMMemoryPlan

    choices = {"transformer": f"{NAME_21} (folder)", "text_encoder": "from the folder", "vae": "from the folder"}
    settings = {"weight_format": "auto", "width": 1024, "height": 1024, "batch_size": 1, "steps": 8, "cfg": 1.0}
    settings |= {"prompt_tokens": 60, "vram_limit_gb": 0.0, "ram_limit_gb": 0.0}
    plan = QwenLowVRAMMemoryPlan()
    alone, edit = (plan.plan(**choices, **settings, reference_pictures=count)["result"][0] for count in (0, 2))
    assert "2 to change" in edit
    for text in (alone, edit):
        assert all(stage in text for stage in ("encode", "sampling", "decode"))
    with pytest.raises(InvalidRequest, match="layers"):
        plan.plan(**choices, **settings, layers=2)


@pytest.mark.parametrize("weight_format", ["int8", "nf4"])
def test_its_weights_are_quantized_at_the_first_load_and_kept(load: Any, weight_format: str) -> None:
    case = CASES["text"]
    first = load(weight_format=weight_format)
    assert first[0].model.transformer.weight_format.endswith(weight_format)  # of bitsandbytes, as bnb_int8
    image = make(*first, case)[0]
    plain = make(*load(), case)[0]
    assert torch.equal(make(*load(weight_format=weight_format), case)[0], image)
    assert 0 < (image - plain).abs().mean() < 0.1
