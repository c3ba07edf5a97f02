"""Parts of Qwen-Image-2.1 and of the 20B family, mixed in every way: refused by the name of what belongs there, before
anything is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import InvalidRequest, QwenLowVRAMError, WrongModel
from torch import Tensor

from .conftest import NAME_21
from .test_editing_21 import BASE, MEGAPIXELS

OLD, NEW = "the 20B family's", "2.1's"


@pytest.fixture
def load(diffusers_21: Path, small_pipeline: Path, models: Any, tmp_path: Path) -> Callable[..., Any]:
    """`load(transformer=NEW, text_encoder=OLD)`: what is not named is the transformer's own."""
    folders = {NEW: diffusers_21 / NAME_21, OLD: small_pipeline}
    models("diffusers", str(diffusers_21))
    models("diffusers", str(small_pipeline.parent))
    for kind in ("text_encoder", "vae"):
        (tmp_path / kind).mkdir()
        for whose, folder in folders.items():
            (file,) = (folder / kind).glob("*.safetensors")
            (tmp_path / kind / f"{'new' if whose is NEW else 'old'}_{kind}.safetensors").symlink_to(file)
    models("text_encoders", str(tmp_path / "text_encoder"))
    models("vae", str(tmp_path / "vae"))

    def of(transformer: str, **parts: str) -> Any:
        from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

        choices = {"transformer": f"{folders[transformer].name} (folder)"}
        choices |= {"text_encoder": "from the folder", "vae": "from the folder"}
        for kind, whose in parts.items():
            choices[kind] = f"{'new' if whose is NEW else 'old'}_{kind}.safetensors"
        settings = {"dtype": "fp32", "weight_format": "auto", "vram_limit_gb": 0.0, "timesteps": "fp32"}
        return QwenLowVRAMLoader().load(**{**choices, **settings})

    return of


def pixels(count: int = 1) -> Tensor:
    return torch.rand(count, 320, 320, 3, generator=torch.Generator().manual_seed(0))


def encode(clip: Any, vae: Any, *, variant: str = "auto", **images: Any) -> Any:
    from qwenimage_lowvram.nodes.encode_edit import QwenLowVRAMEncodeEditPrompt

    settings = {"megapixels": MEGAPIXELS, "width": 0, "height": 0, "batch_size": 1, "variant": variant}
    prompts = {name: BASE[name] for name in ("positive", "negative")}
    return QwenLowVRAMEncodeEditPrompt().encode(clip, vae, **prompts, **settings, **images)["result"]


def sample(model: Any, positive: Any, negative: Any, latent: Any) -> Any:
    from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

    settings = {"seed": 1, "steps": 2, "cfg": 3.0, "denoise": 1.0, "sampler": "euler", "scheduler": "qwen_image"}
    return QwenLowVRAMSample().sample(model, positive, negative, latent, **settings, norm_rescale=True)["result"][0]


@pytest.mark.parametrize(
    ("transformer", "parts", "named"),
    [
        (NEW, {"text_encoder": OLD}, r"^text_encoder: .* a Qwen3-VL text encoder is needed here.* such as qwen3vl_8b_"),
        (NEW, {"vae": OLD}, r"^vae: .* is another model's VAE.* Use qwen_image_2\.1_vae_bf16\.safetensors"),
        (NEW, {"text_encoder": OLD, "vae": OLD}, r"^text_encoder: .* a Qwen3-VL text encoder is needed here"),
        (
            OLD,
            {"text_encoder": NEW},
            r"^text_encoder: .* a Qwen2\.5-VL text encoder is needed here.* such as qwen_2\.5",
        ),
        (OLD, {"vae": NEW}, r"^vae: .*qwen_image_vae\.safetensors"),
        (OLD, {"text_encoder": NEW, "vae": NEW}, r"^text_encoder: .* a Qwen2\.5-VL text encoder is needed here"),
    ],
)
def test_the_loader_names_the_part_that_belongs_there(
    transformer: str, parts: dict[str, str], named: str, load: Any
) -> None:
    with pytest.raises(WrongModel, match=named):
        load(transformer, **parts)


@pytest.mark.parametrize("whose", [NEW, OLD])
def test_an_edit_needs_encoder_vae_and_variant_of_one_model(whose: str, load: Any) -> None:
    other = OLD if whose is NEW else NEW
    _, clip, vae = load(whose)
    _, _, other_vae = load(other)
    needed = "64" if whose is NEW else "16"
    example = r"qwen_image_2\.1_vae_bf16" if whose is NEW else "qwen_image_vae"
    with pytest.raises(
        WrongModel, match=rf"(?s)^vae belongs to another model.* needs {needed}\..*load {example}"
    ) as refused:
        encode(clip, other_vae, image1=pixels())
    assert refused.value.code == "edit.other_vae"
    variant = "Qwen-Image-Edit-2509" if whose is NEW else "Qwen-Image-2.1"
    encoder = (
        r"Qwen2\.5-VL text encoder, such as qwen_2\.5" if whose is NEW else "Qwen3-VL text encoder, such as qwen3vl"
    )
    with pytest.raises(WrongModel, match=rf"(?s)^clip is .* another model; {variant} needs a {encoder}"):
        encode(clip, vae, variant=variant, image1=pixels())
    assert clip.encoder.fetched_bytes == 0


@pytest.mark.parametrize("whose", [NEW, OLD])
def test_a_sampler_and_a_decoder_name_what_is_of_the_other_model(whose: str, load: Any) -> None:
    from qwenimage_lowvram.nodes.decode import QwenLowVRAMDecode

    other = OLD if whose is NEW else NEW
    model, clip, vae = load(whose)
    _, other_clip, other_vae = load(other)
    own, others = encode(clip, vae), encode(other_clip, other_vae)
    store = model.model.transformer.store
    encoder = "Qwen3-VL-8B" if whose is NEW else r"Qwen2\.5-VL"
    narrow = [[others[0][0][0][..., :40], others[0][0][1]]]  # real encoders of the two differ in width
    for positive, negative in ((narrow, own[1]), (own[0], narrow)):
        with pytest.raises(InvalidRequest, match=rf"(?s)have 40 dimensions, but 64 are needed.*{encoder}"):
            sample(model, positive, negative, own[2])
    filled = {**others[2], "samples": others[2]["samples"] + 1}
    with pytest.raises(QwenLowVRAMError, match=r"channels|have four dimensions|5D|numbers"):
        sample(model, *own[:2], filled)
    assert store.fetched_blocks == 0
    with pytest.raises(InvalidRequest, match=r"another model.*64: qwen_image_2\.1_vae_bf16\.safetensors"):
        QwenLowVRAMDecode().decode(filled, vae, 0)


def test_thirteen_images_are_refused_however_they_come(load: Any) -> None:
    _, clip, vae = load(NEW)
    images = {f"image{i + 1}": pixels() for i in range(13)}
    with pytest.raises(
        InvalidRequest, match=r"(?s)no input 'image13' here: a model can be shown at most 12 images.*use fewer"
    ) as refused:
        encode(clip, vae, **images)
    assert refused.value.code == "edit.no_such_input"
    with pytest.raises(InvalidRequest, match=r"Image 1 has the shape \[13, 320, 320, 3\].*one image"):
        encode(clip, vae, image1=pixels(13))
    with pytest.raises(InvalidRequest, match=r"Image 12 has the shape \[2, 320, 320, 3\].*its own input"):
        encode(clip, vae, **{f"image{i + 1}": pixels(1 + (i == 11)) for i in range(12)})
    assert clip.encoder.fetched_bytes == 0
