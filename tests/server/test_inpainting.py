"""Image to image, inpainting and outpainting through the real server: our nodes make the latents of diffusers'
pipelines, and what a mask leaves out stays."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devtools.client import ComfyClient, ExecutionFailed
from devtools.server import ComfyServer
from edit_reference import FIRST_HEIGHT, FIRST_WIDTH
from inpaint_reference import Img2ImgPipeline, InpaintPipeline, edit_inpaint_pipeline, start_pipeline
from PIL import Image
from qwenimage_lowvram.engine.models.qwen_image.latents import unpack
from qwenimage_lowvram.engine.models.qwen_image_vae.latent_statistics import LATENTS_MEAN, LATENTS_STD
from safetensors.torch import load_file

from .graphs import (
    FOLDER,
    IMAGE_TO_IMAGE,
    INPAINT,
    OUTPAINT,
    Prompt,
    changed,
    with_inputs,
    workflow_from_image,
)

PROMPT, NEGATIVE = "a red circle", "blurry"
SEED, CFG = 5, 4.0
SIZE = (112, 80)
# the reference's steps and strength -> the KSampler's and ours, which count only the steps that are taken
STRENGTHS = [(5, 0.6), (8, 0.5), (10, 0.35), (4, 1.0)]


def steps_and_denoise(steps: int, strength: float) -> dict[str, Any]:
    """Of our node, for diffusers' num_inference_steps and strength: it rounds up to whole steps."""
    taken = steps - int(max(steps - steps * strength, 0))
    return {"steps": taken, "denoise": taken / steps}


def smooth(size: tuple[int, int], seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BILINEAR)


def block_mask(size: tuple[int, int]) -> Image.Image:
    """White on the cells of the latent that are to change: diffusers takes the nearest pixel, ComfyUI their mean.

    RGB, because ComfyUI reads the white of a grey PNG as less than 1."""
    cells = np.zeros((size[1] // 8, size[0] // 8), dtype=np.uint8)
    cells[2:-3, 3:-4] = 255
    cells[-1, 0] = 255
    return Image.fromarray(cells.repeat(8, 0).repeat(8, 1)).convert("RGB")


@pytest.fixture(scope="module")
def shown(comfy_server: ComfyServer) -> dict[str, Image.Image]:
    """Images and masks by file name, in the server's input folder."""
    made = {
        "start.png": smooth(SIZE, 0),
        "start mask.png": block_mask(SIZE),
        "edit start.png": smooth((FIRST_WIDTH, FIRST_HEIGHT), 1),
        "edit mask.png": block_mask((FIRST_WIDTH, FIRST_HEIGHT)),
    }
    for name, image in made.items():
        image.save(comfy_server.base / "input" / name)
    return made


@pytest.fixture
def graph(full_pipeline: Path, shown: Any, models_dir: Path) -> Callable[..., Prompt]:
    """`graph(steps=...)` -> loader 1, prompts 2, picture 10, encoded 11, mask 12, masked 13, sampler 4, decoder 5,
    saved picture 6, saved latent 7. The sampler starts from 11; further values are the sampler's."""

    def make(**values: Any) -> Prompt:
        loader = {
            "transformer": f"{full_pipeline.name} (folder)", "text_encoder": FOLDER, "vae": FOLDER, "dtype": "fp32",
            "weight_format": "as stored", "vram_limit_gb": 0.0, "timesteps": "fp32", "positions": "diffusers",
        }  # fmt: skip
        settings = {
            "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 1], "latent_image": ["11", 0], "seed": SEED,
            "steps": 4, "cfg": CFG, "sampler": "euler", "scheduler": "qwen_image", "denoise": 1.0, "norm_rescale": True,
        }  # fmt: skip
        return changed(
            {},
            n1=("QwenLowVRAMLoader", loader),
            n2=("QwenLowVRAMEncodePrompts", {"clip": ["1", 1], "positive": PROMPT, "negative": NEGATIVE}),
            n10=("LoadImage", {"image": "start.png"}),
            n11=("VAEEncode", {"pixels": ["10", 0], "vae": ["1", 2]}),
            n12=("LoadImageMask", {"image": "start mask.png", "channel": "red"}),
            n13=("SetLatentNoiseMask", {"samples": ["11", 0], "mask": ["12", 0]}),
            n4=("QwenLowVRAMSample", settings | values),
            n5=("QwenLowVRAMDecode", {"samples": ["4", 0], "vae": ["1", 2], "tile_size": 0}),
            n6=("SaveImage", {"images": ["5", 0], "filename_prefix": "inpaint"}),
            n7=("SaveLatent", {"samples": ["4", 0], "filename_prefix": "inpaint"}),
        )

    return make


@pytest.fixture
def latents(client: ComfyClient, comfy_server: ComfyServer) -> Callable[[Prompt], torch.Tensor]:
    """`latents(prompt)` -> what its node 7 saves, (B, 16, 1, h, w)."""

    def run(prompt: Prompt) -> torch.Tensor:
        (saved,) = client.run(prompt).outputs["7"]["latents"]
        return load_file(comfy_server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]

    return run


def reference(pipeline: Any, size: tuple[int, int], cfg: float = CFG, **inputs: Any) -> torch.Tensor:
    """The latents of a pipeline of diffusers as ComfyUI has them."""
    made = pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        true_cfg_scale=cfg,
        width=size[0],
        height=size[1],
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        **inputs,
    ).images
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (LATENTS_MEAN, LATENTS_STD))
    return unpack(made, size[1] // 8, size[0] // 8) * std + mean


@pytest.mark.parametrize(("steps", "strength"), STRENGTHS)
def test_image_to_image_has_the_latents_of_diffusers(
    steps: int,
    strength: float,
    graph: Callable[..., Prompt],
    latents: Callable[[Prompt], torch.Tensor],
    shown: dict[str, Image.Image],
    full_pipeline: Path,
) -> None:
    ours = latents(graph(**steps_and_denoise(steps, strength)))
    pipeline = start_pipeline(Img2ImgPipeline, full_pipeline)
    wanted = reference(pipeline, SIZE, image=shown["start.png"], num_inference_steps=steps, strength=strength)
    assert wanted.std() > 0.5
    assert (ours - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(("steps", "strength"), STRENGTHS)
def test_inpainting_has_the_latents_of_diffusers(
    steps: int,
    strength: float,
    graph: Callable[..., Prompt],
    latents: Callable[[Prompt], torch.Tensor],
    shown: dict[str, Image.Image],
    full_pipeline: Path,
) -> None:
    ours = latents(graph(**steps_and_denoise(steps, strength), latent_image=["13", 0]))
    pipeline = start_pipeline(InpaintPipeline, full_pipeline)
    wanted = reference(
        pipeline,
        SIZE,
        image=shown["start.png"],
        mask_image=shown["start mask.png"],
        num_inference_steps=steps,
        strength=strength,
    )
    assert wanted.std() > 0.5
    assert (ours - wanted).abs().max() < 1e-4


def test_inpainting_with_an_edit_model_has_the_latents_of_diffusers(
    graph: Callable[..., Prompt],
    latents: Callable[[Prompt], torch.Tensor],
    shown: dict[str, Image.Image],
    full_pipeline: Path,
) -> None:
    edit = {
        "clip": ["1", 1], "vae": ["1", 2], "positive": PROMPT, "negative": NEGATIVE, "width": 0, "height": 0,
        "megapixels": 1.0, "batch_size": 1, "variant": "auto", "image1": ["10", 0],
    }  # fmt: skip
    prompt = graph(**steps_and_denoise(4, 0.5), latent_image=["13", 0], cfg=1.0)  # images of a megapixel take long
    prompt = with_inputs(prompt, "1", variant="Qwen-Image-Edit")
    prompt = with_inputs(with_inputs(prompt, "10", image="edit start.png"), "12", image="edit mask.png")
    ours = latents(changed(prompt, n2=("QwenLowVRAMEncodeEditPrompt", edit)))
    wanted = reference(
        edit_inpaint_pipeline(full_pipeline),
        (FIRST_WIDTH, FIRST_HEIGHT),
        cfg=1.0,
        image=shown["edit start.png"],
        mask_image=shown["edit mask.png"],
        num_inference_steps=4,
        strength=0.5,
    )
    assert wanted.std() > 0.5
    assert (ours - wanted).abs().max() < 1e-4


# the shipped graphs


PHOTO = (200, 150)
# of the image's right, in its own pixels; the graph's mask ends well before STAYS
PAINTED, STAYS = (slice(40, 100), slice(140, 190)), 125


@pytest.fixture(scope="module")
def photo(comfy_server: ComfyServer) -> np.ndarray:
    """An image whose sides are no multiples of 16, as "photo.png" and, with a mask as the MaskEditor saves it, as
    "painted.png"."""
    image = smooth(PHOTO, 2)
    image.save(comfy_server.base / "input" / "photo.png")
    alpha = np.full(PHOTO[::-1], 255, dtype=np.uint8)
    alpha[PAINTED] = 0
    image.putalpha(Image.fromarray(alpha))
    image.save(comfy_server.base / "input" / "painted.png")
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def shipped(object_info: dict[str, Any], full_pipeline: Path, models_dir: Path) -> Callable[..., Prompt]:
    folder = {"transformer": f"{full_pipeline.name} (folder)", "text_encoder": FOLDER, "vae": FOLDER, "dtype": "fp32"}
    prompts = {"positive": PROMPT, "negative": NEGATIVE}

    def make(path: Path, image: str) -> Prompt:
        sample = {"seed": SEED, "steps": 2}
        return workflow_from_image(path, object_info, folder, image, prompts=prompts, sample=sample)

    return make


def image_of(client: ComfyClient, prompt: Prompt) -> np.ndarray:
    (image,) = client.run(prompt).images()
    return np.asarray(Image.open(io.BytesIO(client.image(image))).convert("RGB")).astype(int)


def test_the_inpaint_graph_leaves_every_pixel_outside_its_mask_as_it_was(
    client: ComfyClient, shipped: Callable[..., Prompt], photo: np.ndarray
) -> None:
    made = image_of(client, shipped(INPAINT, "painted.png"))
    assert made.shape == photo.shape
    assert (made[:, :STAYS] == photo[:, :STAYS]).all()
    assert (made[120:] == photo[120:]).all()
    assert np.abs(made - photo)[PAINTED].mean() > 5


def test_all_that_was_painted_is_new(client: ComfyClient, shipped: Callable[..., Prompt], photo: np.ndarray) -> None:
    prompt = shipped(INPAINT, "painted.png")
    # another image instead of the decoded one: where the mask is 1, nothing else is left
    black = ("EmptyImage", {"width": 64, "height": 64, "batch_size": 1, "color": 0})
    made = image_of(client, with_inputs(changed(prompt, n30=black), "19", source=["30", 0]))
    assert made[PAINTED].max() == 0
    assert (made[:, :STAYS] == photo[:, :STAYS]).all()


def test_the_outpaint_graph_adds_to_an_image_that_stays(
    client: ComfyClient, shipped: Callable[..., Prompt], photo: np.ndarray
) -> None:
    made = image_of(client, shipped(OUTPAINT, "photo.png"))
    assert made.shape == (PHOTO[1], PHOTO[0] + 64, 3)
    inside = PHOTO[0] - 4
    assert (made[:, :inside] == photo[:, :inside]).all()
    assert made[:, PHOTO[0] :].std() > 10  # grey before


def test_the_image_to_image_graph_follows_its_image_by_denoise(
    client: ComfyClient, shipped: Callable[..., Prompt], photo: np.ndarray
) -> None:
    prompt = shipped(IMAGE_TO_IMAGE, "photo.png")
    results = [image_of(client, with_inputs(prompt, "4", denoise=denoise)) for denoise in (0.05, 0.5, 1.0)]
    assert results[0].shape == (112, 144, 3)
    changes = [np.abs(result - results[0]).mean() for result in results[1:]]
    assert 1 < changes[0] < changes[1]


def test_the_inpaint_graph_without_a_mask_says_how_to_paint_one(
    client: ComfyClient, shipped: Callable[..., Prompt], photo: np.ndarray
) -> None:
    with pytest.raises(ExecutionFailed, match=r"noise mask is empty(.|\n)*Mask Editor"):
        client.run(shipped(INPAINT, "photo.png"))


def test_a_photo_that_was_not_scaled_keeps_its_size_and_the_log_says_so(
    client: ComfyClient, comfy_server: ComfyServer, shipped: Callable[..., Prompt], photo: np.ndarray
) -> None:
    logged = len(comfy_server.log)
    result = image_of(client, with_inputs(shipped(IMAGE_TO_IMAGE, "photo.png"), "12", pixels=["10", 0]))
    assert result.shape == (144, 200, 3)
    assert "An image of 200x144 px is not a multiple of 16" in comfy_server.log[logged:]
