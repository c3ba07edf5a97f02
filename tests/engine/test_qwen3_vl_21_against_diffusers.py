"""Qwen-Image-2.1's prompts are encoded as diffusers' pipeline does it. Collected where diffusers has it (0.42)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Pipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen3_vl.prompts import PromptTokenizer
from qwenimage_lowvram.engine.models.qwen3_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen3_vl.vision_patches import patch_image, resize_image
from qwenimage_lowvram.engine.models.qwen_vl.image_prompts import ImagePrompt
from qwenimage_lowvram.engine.runs.encode import EncodeRun
from qwenimage_lowvram.engine.runs.limit import Limit
from qwenimage_lowvram.engine.runs.surroundings import Alone
from qwenimage_lowvram.engine.runs.timeline import Timeline
from small_checkpoint import make_tokenizer
from small_qwen3_vl import make_processor, make_qwen3_vl

PROMPTS = ["make the sky red", "", "白色背景上的红色圆形", "image " * 200, "as in <image1> {x}"]
SIZES = [(256, 288), (512, 256), (320, 320)]  # (height, width)


@pytest.fixture(scope="module")
def pipeline(comfyui_path: Path) -> Any:
    tokenizer = make_tokenizer(full=False, comfyui=comfyui_path)
    return QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=make_qwen3_vl(tokenizer),
        processor=make_processor(tokenizer),
        transformer=None,
    )


@pytest.fixture(scope="module")
def run(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> EncodeRun:
    folder = tmp_path_factory.mktemp("encoder")
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    pipeline.processor.tokenizer.save_pretrained(folder / "tokenizer")
    checkpoint, hardware = open_checkpoint(folder / "text_encoder"), Hardware.detect(torch.device("cpu"))
    encoder = TextEncoder(checkpoint, dtype=torch.float32, hardware=hardware)
    tokenizer = PromptTokenizer(folder / "tokenizer")
    return EncodeRun(encoder, tokenizer, Timeline(lambda: 0), Alone(None, ()), Limit(None, "limit"))


def levels(height: int, width: int, channels: int, seed: int) -> torch.Tensor:
    """(1, height, width, channels) in steps of 1/255, as a person's image is."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, height, width, channels), generator=generator) / 255


def pillow(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray((pixels[0] * 255).round().byte().numpy(), "RGBA" if pixels.shape[-1] == 4 else "RGB")


@pytest.mark.parametrize("text", PROMPTS)
def test_a_prompt_is_encoded_bit_for_bit(text: str, pipeline: Any, run: EncodeRun) -> None:
    wanted, mask, _ = pipeline.encode_prompt(text)
    tokenizer: Any = run.tokenizer
    (ours,) = run.encode([ImagePrompt(tuple(tokenizer.encode(text)))])
    assert mask is None
    assert torch.equal(ours, wanted)
    assert wanted.std() > 0.1


def test_prompts_of_a_batch_are_encoded_as_alone(pipeline: Any, run: EncodeRun) -> None:
    """There, shorter ones are padded on the left and masked, which sums in another order."""
    wanted, mask, _ = pipeline.encode_prompt(PROMPTS)
    tokenizer: Any = run.tokenizer
    for i, ours in enumerate(run.encode([ImagePrompt(tuple(tokenizer.encode(text))) for text in PROMPTS])):
        length = int(mask[i].sum())
        assert ours.shape[1] == length
        assert (ours[0] - wanted[i, :length]).abs().max() < 1e-5


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_prompts_that_show_images_are_encoded_as_there(
    count: int, channels: int, pipeline: Any, run: EncodeRun
) -> None:
    """One image bit for bit; several are seen one after another here and all at once there."""
    shown = [levels(*size, channels, i) for i, size in enumerate(SIZES[:count])]
    patched = tuple(patch_image(pixels) for pixels in shown)
    tokenizer: Any = run.tokenizer
    prompts = [ImagePrompt(tuple(tokenizer.encode(text, images=count)), patched) for text in PROMPTS]
    for text, prompt, ours in zip(PROMPTS, prompts, run.encode(prompts), strict=True):
        wanted, _, slots = pipeline.encode_prompt(text, image=[pillow(pixels) for pixels in shown])
        assert ours.shape == wanted.shape
        assert (ours - wanted).abs().max() < 1e-5
        if count == 1:
            assert torch.equal(ours, wanted)
        start = prompt.place(tokenizer.start(prompt.tokens))
        mine = torch.zeros(prompt.length, dtype=torch.bool)
        for begin, end in prompt.image_spans:
            mine[begin:end] = True
        assert torch.equal(mine[start:], slots[0].bool())


@pytest.mark.parametrize("channels", [3, 4])
def test_an_image_is_resized_as_there(channels: int) -> None:
    pixels = levels(111, 97, channels, 0)
    wanted = VaeImageProcessor(vae_scale_factor=16).resize(pillow(pixels), width=288, height=320)
    made = resize_image(pixels, 288, 320)
    assert pillow(made).tobytes() == wanted.tobytes()
