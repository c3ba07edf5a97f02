"""Qwen-Image-2.1's prompts become the reference's tokens, and its images the patches of the reference's processor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from qwenimage_lowvram.engine.errors import InvalidRequest
from qwenimage_lowvram.engine.models.qwen3_vl.prompt_template import PROMPT_TEMPLATE, SYSTEM_TURN
from qwenimage_lowvram.engine.models.qwen3_vl.prompts import MAX_PROMPT_CHARACTERS, PromptTokenizer
from qwenimage_lowvram.engine.models.qwen3_vl.vision_patches import patch_image, resize_image
from qwenimage_lowvram.engine.models.qwen_vl.image_prompts import IMAGE, ImagePrompt
from qwenimage_lowvram.engine.models.qwen_vl.images import PatchedImage
from small_checkpoint import make_tokenizer
from small_qwen3_vl import make_processor


@pytest.fixture(scope="module")
def tokenizer(comfyui_path: Path) -> Any:
    return make_tokenizer(full=False, comfyui=comfyui_path)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return PromptTokenizer(folder)


def random_image(height: int, width: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    return torch.rand(1, height, width, channels, generator=torch.Generator().manual_seed(seed))


# prompts


def test_the_template_is_the_references(prompts: PromptTokenizer, tokenizer: Any) -> None:
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    for text, images_shown, written in [
        ("a cat", 0, "a cat"),
        ("", 0, " "),
        ("a cat", 1, f"<image1>{place}a cat"),
        ("", 2, f"<image1>{place} <image2>{place} "),
    ]:
        ids = prompts.encode(text, images=images_shown)
        pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        assert [pad if token == IMAGE else token for token in ids] == tokenizer.encode(PROMPT_TEMPLATE.format(written))
        assert ids.count(IMAGE) == images_shown
        assert prompts.start(ids) == len(tokenizer.encode(SYSTEM_TURN))


def test_a_template_of_ones_own_keeps_what_is_behind_its_system_turn(prompts: PromptTokenizer) -> None:
    own = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
    ids = prompts.encode(own)
    assert prompts.start(ids) == len(prompts.encode("<|im_start|>system\nBe brief.<|im_end|>\n"))
    assert prompts.start(prompts.encode("<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n")) == 0
    with pytest.raises(InvalidRequest, match="1 image, but has 0 places"):
        prompts.encode(own, images=1)


def test_what_is_too_long_is_refused_before_it_is_encoded(prompts: PromptTokenizer) -> None:
    with pytest.raises(InvalidRequest, match="131073 characters"):
        prompts.encode("a" * (MAX_PROMPT_CHARACTERS + 1))
    with pytest.raises(InvalidRequest, match="text is needed"):
        prompts.encode(None)  # type: ignore[arg-type]
    image = PatchedImage(torch.zeros(0), 64, 4096)
    short = ImagePrompt((IMAGE,), (image,))
    prompts.require_length(short)
    with pytest.raises(InvalidRequest, match=r"takes 8192 positions, 0 of them for its text; the model has 8191"):
        prompts.require_length(ImagePrompt((IMAGE, IMAGE), (image, image)))


# pixels


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows=st.integers(8, 16), columns=st.integers(8, 16), seed=st.integers(0, 99))
def test_an_image_is_patched_as_by_the_processor(rows: int, columns: int, seed: int, tokenizer: Any) -> None:
    levels = (random_image(32 * rows, 32 * columns, seed) * 255).round()
    processor = make_processor(tokenizer).image_processor
    wanted = processor(images=[Image.fromarray(levels[0].byte().numpy())], return_tensors="pt")
    ours = patch_image(levels / 255)
    assert wanted["image_grid_thw"].tolist() == [[1, ours.height, ours.width]]
    assert (ours.patches - wanted["pixel_values"]).abs().max() < 1e-6


def test_transparency_is_seen_on_white() -> None:
    image = random_image(256, 288, channels=4)
    flat = Image.fromarray((image[0] * 255).round().byte().numpy(), "RGBA")
    white = Image.new("RGB", flat.size, (255, 255, 255))
    white.paste(flat, mask=flat.getchannel("A"))
    levels = torch.frombuffer(bytearray(white.tobytes()), dtype=torch.uint8).view(1, 256, 288, 3)
    assert patch_image(image).digest == patch_image(levels / 255).digest
    opaque = image.clone()
    opaque[..., 3] = 1
    assert patch_image(opaque).digest == patch_image(opaque[..., :3]).digest


@pytest.mark.parametrize("channels", [3, 4])
def test_an_image_is_resized_as_pillow_does_it(channels: int) -> None:
    image = random_image(100, 130, channels=channels)
    mode = "RGB" if channels == 3 else "RGBA"
    given_image = Image.fromarray((image[0] * 255).round().byte().numpy(), mode)
    wanted = given_image.resize((288, 224), Image.Resampling.LANCZOS)
    made = resize_image(image, 288, 224)
    assert made.shape == (1, 224, 288, channels)
    assert (made[0] * 255).round().byte().numpy().tobytes() == wanted.tobytes()
    assert resize_image(image, 130, 100) is image


@pytest.mark.parametrize("shape", [(2, 64, 64, 3), (64, 64, 3), (1, 64, 64, 1), (1, 0, 64, 3)])
def test_what_is_no_image_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"has the shape .*Choose one from a batch"):
        patch_image(torch.zeros(shape))
    with pytest.raises(InvalidRequest, match=r"has the shape .*is needed: one image"):
        resize_image(torch.zeros(shape), 32, 32)


def test_an_image_that_is_no_multiple_of_32_or_too_long_is_resized_or_refused() -> None:
    odd = patch_image(random_image(270, 300))
    assert (odd.height, odd.width) == (16, 18)
    with pytest.raises(InvalidRequest, match="300x1 px is too long and narrow"):
        patch_image(random_image(1, 300))
