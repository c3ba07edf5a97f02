"""From prompt to IMAGE through our nodes, against diffusers' own pipeline on the same folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline

PROMPT, NEGATIVE = 'a sign that says "红色"', "blurry"
STEPS = 4


@pytest.fixture(scope="module")
def pipeline(small_pipeline: Path) -> QwenImagePipeline:
    pipe = QwenImagePipeline.from_pretrained(small_pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference(pipe: QwenImagePipeline, size: tuple[int, int], negative: str | None) -> torch.Tensor:
    """IMAGE (1, H, W, 3) of diffusers' pipeline."""
    image = pipe(
        PROMPT,
        negative_prompt=negative,
        true_cfg_scale=4.0,
        width=size[0],
        height=size[1],
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=1024,
        output_type="pt",
    ).images
    return image.float().permute(0, 2, 3, 1)


def made_image(folder: Path, size: tuple[int, int], negative: str | None, dtype: torch.dtype = torch.float32) -> Any:
    """IMAGE of our nodes on the same folder."""
    from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
    from qwenimage_lowvram.engine.hardware import Hardware
    from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
    from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer
    from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
    from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP
    from qwenimage_lowvram.nodes.adapters.model import make_model
    from qwenimage_lowvram.nodes.adapters.vae import make_vae
    from qwenimage_lowvram.nodes.decode import QwenLowVRAMDecode
    from qwenimage_lowvram.nodes.encode import QwenLowVRAMEncodePrompts
    from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

    options = {"dtype": dtype, "hardware": Hardware.detect(torch.device("cpu"))}
    encoder = TextEncoder(open_checkpoint(folder / "text_encoder"), **options)
    clip = LowVRAMCLIP(encoder, PromptTokenizer(folder / "tokenizer"), None)
    model = make_model(QwenImageTransformer(open_checkpoint(folder / "transformer"), **options), None)
    vae = make_vae(open_checkpoint(folder / "vae"), dtype=dtype, limit_bytes=None)
    positive, negatives = QwenLowVRAMEncodePrompts().encode(clip, PROMPT, negative or " ")
    empty = {"samples": torch.zeros(1, 16, size[1] // 8, size[0] // 8)}
    cfg = 4.0 if negative is not None else 1.0
    result = QwenLowVRAMSample().sample(
        model, positive, negatives, empty, 5, STEPS, cfg, "euler", "qwen_image", 1.0, True
    )
    return QwenLowVRAMDecode().decode(result["result"][0], vae, 0)[0]


# 7x5, 4x4 and 9x11 patches: odd grids, as the default 1328x1328 has, and an even one
@pytest.mark.parametrize("size", [(112, 80), (64, 64), (144, 176)])
@pytest.mark.parametrize("negative", [NEGATIVE, None])
def test_the_image_is_that_of_diffusers(
    small_pipeline: Path, pipeline: QwenImagePipeline, size: tuple[int, int], negative: str | None
) -> None:
    ours = made_image(small_pipeline, size, negative)
    assert ours.shape == (1, size[1], size[0], 3)
    assert (ours - reference(pipeline, size, negative)).abs().max() < 1e-4


def test_bf16_is_as_close_to_fp32_as_diffusers_own(small_pipeline: Path, pipeline: QwenImagePipeline) -> None:
    size = (112, 80)
    exact = reference(pipeline, size, NEGATIVE)
    halved = QwenImagePipeline.from_pretrained(small_pipeline, torch_dtype=torch.bfloat16)
    halved.set_progress_bar_config(disable=True)
    theirs = (reference(halved, size, NEGATIVE) - exact).square().mean().sqrt()
    ours = (made_image(small_pipeline, size, NEGATIVE, torch.bfloat16).float() - exact).square().mean().sqrt()
    assert ours <= theirs


def test_prompts_longer_than_the_reference_allows_are_used_whole(
    small_pipeline: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer

    tokenizer = PromptTokenizer(small_pipeline / "tokenizer")
    ids = tokenizer.encode("word " * 1100)
    assert ids[-5:] == tokenizer.encode("a")[-5:]  # the template's end is there
    assert "1024" in caplog.text


@pytest.mark.parametrize("channels", [3, 4])
def test_decode_gives_a_mask_of_what_is_transparent(comfy: Any, channels: int) -> None:
    import comfy.sd
    from qwenimage_lowvram.nodes.decode import QwenLowVRAMDecode

    image = torch.rand((2, 4, 6, channels), generator=torch.Generator().manual_seed(1))

    class Drawn(comfy.sd.VAE):
        def __init__(self) -> None:
            pass

        def decode(self, samples: torch.Tensor) -> torch.Tensor:
            return image

    images, mask = QwenLowVRAMDecode().decode({"samples": torch.zeros(2, 16, 1, 2, 2)}, Drawn(), 0)
    assert torch.equal(images, image)
    assert torch.equal(mask, 1 - image[..., 3] if channels == 4 else torch.zeros(2, 4, 6))
