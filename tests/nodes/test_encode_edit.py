"""Encode Edit Prompt: both prompts with all images in one visit, references and output on one grid."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import InvalidRequest
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.prompt_template import EDIT_TEMPLATE
from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer, with_places
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant

from .native_encoder import as_clip, native_encoder
from .test_model import ksampler

AREA = 0.02  # megapixels, for speed: 160x128 and the like
DEFAULTS = {"megapixels": AREA, "width": 0, "height": 0, "batch_size": 1, "variant": "auto"}


@pytest.fixture(scope="module")
def native(full_pipeline: Path, comfy: Any) -> Iterator[Any]:
    with native_encoder(full_pipeline) as encoder:
        yield as_clip(*encoder)


@pytest.fixture
def make_clip(full_pipeline: Path, comfy: Any) -> Callable[..., Any]:
    from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP

    def make(variant: Variant | None = None) -> Any:
        hardware = Hardware.detect(torch.device("cpu"))
        encoder = TextEncoder(open_checkpoint(full_pipeline / "text_encoder"), dtype=torch.float32, hardware=hardware)
        return LowVRAMCLIP(encoder, PromptTokenizer(full_pipeline / "tokenizer"), None, variant=variant)

    return make


@pytest.fixture
def vae(full_pipeline: Path) -> Any:
    from qwenimage_lowvram.nodes.adapters.vae import make_vae

    return make_vae(open_checkpoint(full_pipeline / "vae"), dtype=torch.float32, limit_bytes=None)


def encode(clip: Any, vae: Any, *given: torch.Tensor | None, **options: Any) -> Any:
    from qwenimage_lowvram.nodes.encode_edit import QwenLowVRAMEncodeEditPrompt

    images = {f"image{i + 1}": image for i, image in enumerate(given)}
    settings = DEFAULTS | {"positive": "make it red", "negative": " "} | options
    return QwenLowVRAMEncodeEditPrompt().encode(clip, vae, **settings, **images)


def made_image(width: int, height: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    return torch.rand(1, height, width, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [[], [(100, 70)], [(160, 128), (64, 64), (90, 200)]], ids=["none", "one", "three"])
@pytest.mark.parametrize("variant", ["auto", Variant.EDIT.value, Variant.EDIT_2511.value])
def test_comfyuis_own_clip_gives_the_same_conditions(
    variant: str, sizes: list[tuple[int, int]], make_clip: Callable[..., Any], native: Any, vae: Any
) -> None:
    if variant == Variant.EDIT.value:
        sizes = sizes[:1]
    images = [made_image(*size, seed=i) for i, size in enumerate(sizes)]
    ours = encode(make_clip(), vae, *images, variant=variant)["result"]
    theirs = encode(native, vae, *images, variant=variant)["result"]
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert one[0][0].shape == other[0][0].shape
        assert (one[0][0] - other[0][0]).abs().max() < 1e-5
    assert not torch.equal(ours[0][0][0][:, -6:], ours[1][0][0][:, -6:])


def test_both_conditions_have_the_references_and_the_latent_lies_on_their_grid(
    make_clip: Callable[..., Any], vae: Any
) -> None:
    result = encode(make_clip(), vae, made_image(1000, 700), made_image(64, 96, 1), batch_size=2)
    positive, negative, latent = result["result"]
    assert result["ui"]["text"] == [
        "output 160x128\nimage 1: 1000x700 to 160x128, 12.5% taller, seen at 448x308\n"
        "image 2: 64x96 to 128x192, seen at 308x476"
    ]
    assert latent["samples"].shape == (2, 16, 1, 16, 20)
    assert not latent["samples"].any()
    for condition in (positive, negative):
        (_, options), *more = condition
        assert not more
        assert [reference.shape for reference in options["reference_latents"]] == [
            (1, 16, 1, 16, 20),
            (1, 16, 1, 24, 16),
        ]


def test_a_reference_is_the_image_itself_where_it_lies_on_the_grid(
    make_clip: Callable[..., Any], vae: Any, full_pipeline: Path
) -> None:
    from diffusers import AutoencoderKLQwenImage

    shown = made_image(160, 128)
    ((_, options),) = encode(make_clip(), vae, shown)["result"][0]
    model = AutoencoderKLQwenImage.from_pretrained(full_pipeline / "vae")
    with torch.no_grad():
        wanted = model.encode(shown.movedim(-1, 1).unsqueeze(2) * 2 - 1).latent_dist.mode()
    assert (options["reference_latents"][0] - wanted).abs().max() < 1e-5


def test_prompts_and_images_take_one_visit_of_encoder_and_tower(make_clip: Callable[..., Any], vae: Any) -> None:
    clip = make_clip()
    encode(clip, vae, made_image(100, 70), made_image(64, 64, 1))
    (report,) = clip.timeline.reports
    files = open_checkpoint(clip.encoder._checkpoint.path).tensors
    read = [entry.nbytes for name, entry in files.items() if name.startswith(("model.layers.", "visual.blocks."))]
    assert report.moved.file_bytes == sum(read)


def test_free_inputs_between_images_are_not_counted(make_clip: Callable[..., Any], vae: Any) -> None:
    shown = made_image(100, 70)
    first, third = (encode(make_clip(), vae, *images)["result"] for images in ((shown,), (None, None, shown)))
    assert torch.equal(first[0][0][0], third[0][0][0])
    assert third[2]["samples"].shape == first[2]["samples"].shape


@pytest.mark.parametrize(
    ("known", "chosen", "labelled"),
    [
        (None, "auto", True),
        (Variant.QWEN_IMAGE, "auto", True),
        (Variant.EDIT_2511, "auto", True),
        (Variant.EDIT, "auto", False),
        (Variant.EDIT, Variant.EDIT_2509.value, True),
        (Variant.EDIT_2509, Variant.EDIT.value, False),
    ],
)
def test_the_model_decides_how_an_image_stands_in_the_prompt(
    known: Variant | None, chosen: str, labelled: bool, make_clip: Callable[..., Any], vae: Any
) -> None:
    result = encode(make_clip(known), vae, made_image(100, 70), variant=chosen)
    assert ("seen at 448x308" if labelled else "seen at 1204x868") in result["ui"]["text"][0]
    text = with_places("make it red", 1, labelled=labelled)
    unseen = make_clip().tokenizer.encode(text, template=EDIT_TEMPLATE)
    seen = 16 * 11 if labelled else 43 * 31
    assert result["result"][0][0][0].shape[1] == len(unseen) - 64 + seen - 1


def test_an_output_of_another_shape_is_said_to_leave_the_grid(make_clip: Callable[..., Any], vae: Any) -> None:
    result = encode(make_clip(), vae, made_image(100, 70), width=64, height=192)
    assert result["result"][2]["samples"].shape[-2:] == (24, 8)
    assert "output 64x192, not on the grid of image 1" in result["ui"]["text"][0]


# no image


def test_without_an_image_an_editing_model_draws_from_text(
    make_clip: Callable[..., Any], vae: Any, full_pipeline: Path
) -> None:
    from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
    from qwenimage_lowvram.nodes.adapters.model import make_model

    positive, negative, latent = encode(make_clip(), vae)["result"]
    assert latent["samples"].shape == (1, 16, 1, 20, 20)
    checkpoint = open_checkpoint(full_pipeline / "transformer")
    hardware = Hardware.detect(torch.device("cpu"))
    transformer = QwenImageTransformer(checkpoint, dtype=torch.float32, hardware=hardware, variant=Variant.EDIT_2509)
    assert torch.isfinite(ksampler(make_model(transformer, None), positive, negative, latent)).all()


# bad input


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (
            [made_image(64, 48, channels=4)],
            {},
            r"Image 1 \(64x48 px\) has 4 channels, with transparency \(RGBA\); red",
        ),
        ([made_image(64, 48), made_image(64, 48, channels=1)], {}, r"Image 2 \(64x48 px\) has 1 channel, greyscale"),
        ([made_image(1, 1)], {}, r"Image 1 is 1x1 px; each side needs at least 16 px"),
        ([made_image(64, 48).repeat(4, 1, 1, 1)], {}, r"Image 1 is a batch of 4 images; one is needed\. Choose one"),
        (
            [made_image(64, 48)] * 2,
            {"variant": Variant.EDIT.value},
            "Qwen-Image-Edit edits at most 1 image at a time, but 2 are",
        ),
        ([made_image(64, 48)] * 4, {}, "Edit-2509 edits at most 3 images at a time, but 4 are connected"),
        ([made_image(16, 4000)], {}, "Image 1 is 16x4000 px, too long and narrow"),
        ([made_image(64, 48)], {"width": 512}, "512x0 px. Set both width and height, or leave both at 0"),
        ([made_image(64, 48)], {"width": 500, "height": 512}, r"500x512 px; .* multiples of 16\.\nUse 496x512"),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(
    images: list[torch.Tensor], options: dict[str, Any], words: str, make_clip: Callable[..., Any], vae: Any
) -> None:
    clip = make_clip()
    with pytest.raises(InvalidRequest, match=words):
        encode(clip, vae, *images, **options)
    assert clip.encoder.fetched_bytes == 0
