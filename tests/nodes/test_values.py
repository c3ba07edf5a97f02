"""Values that no widget gives, as links and programs send them: refused in our words, with the input's name."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import DoesNotFit, InvalidRequest
from qwenimage_lowvram.engine.models.qwen_image.schedule import lightning_sigmas, qwen_sigmas

from .conftest import EDIT, cond, decode, embeds, empty_latent, sample

NAN, INFINITY = math.nan, math.inf
NO_NUMBERS = (
    NAN,
    INFINITY,
    -INFINITY,
    None,
    "4",
    "nan",
    -1e9,
    1e30,
    10**5000,
    True,
    [],
    {},
    torch.tensor(4.0),
    Fraction(3, 2),
)
NO_WHOLE_NUMBERS = (*NO_NUMBERS, 0.5)
NO_TEXTS = (None, 1, NAN, b"a", ["a"], "half \ud83d", "\udfff")
NO_MODELS = (None, 3, "x", {"a": 1}, [1, 2])  # a checkpoint without a text encoder gives None
NO_CHOICES = (None, 0, NAN, "", "no such choice", [], "\ud800")

PLAN = {
    "width": 512,
    "height": 512,
    "batch_size": 1,
    "steps": 4,
    "cfg": 4.0,
    "prompt_tokens": 60,
    "vram_limit_gb": 0.0,
    "ram_limit_gb": 0.0,
    "reference_pictures": 0,
    "layers": 0,
}
LOADER = {
    "dtype": "fp32",
    "vram_limit_gb": 0.0,
    "timesteps": "fp32",
    "ram_limit_gb": 0.0,
    "transformer_device": "auto",
    "text_encoder_device": "auto",
    "vae_device": "auto",
    "positions": "comfyui",
}


def cases(numbers: tuple[str, ...] = (), whole: tuple[str, ...] = (), texts: tuple[str, ...] = (), choices: Any = ()):
    wrong = [(name, NO_NUMBERS) for name in numbers] + [(name, NO_WHOLE_NUMBERS) for name in whole]
    wrong += [(name, NO_TEXTS) for name in texts] + [(name, NO_CHOICES) for name in choices]
    return pytest.mark.parametrize(
        ("name", "value"),
        [pytest.param(name, value, id=f"{name}-{i}") for name, values in wrong for i, value in enumerate(values)],
    )


def refused(name: str, call: Callable[[], Any]) -> str:
    """What the refusal says; it begins with the input's name, and a log and a page can show it."""
    with pytest.raises(InvalidRequest, match=rf"\A{name} is .*; it must be ") as caught:
        call()
    text = str(caught.value)
    assert len(text) < 3000
    text.encode()  # no half of a character
    return text


@cases(("cfg", "denoise"), ("seed", "steps"), choices=("sampler", "scheduler", "preset"))
def test_sample_refuses_values_by_name(model: Any, name: str, value: Any) -> None:
    refused(name, lambda: sample(model, **{name: value}))


@pytest.mark.parametrize(
    ("name", "value"), [("denoise", 1e-9), ("denoise", 0.0), ("cfg", 0.5), ("steps", 0), ("steps", 10**9)]
)
def test_sample_refuses_values_beyond_its_widgets(model: Any, name: str, value: Any) -> None:
    refused(name, lambda: sample(model, **{name: value}))


@cases(("megapixels",), ("width", "height", "batch_size"), ("positive", "negative"), ("variant",))
def test_encode_edit_prompt_refuses_values_by_name(clip: Any, vae: Any, name: str, value: Any) -> None:
    from qwenimage_lowvram.nodes.encode_edit import QwenLowVRAMEncodeEditPrompt

    refused(name, lambda: QwenLowVRAMEncodeEditPrompt().encode(clip, vae, **{**EDIT, name: value}))


@pytest.mark.parametrize("value", NO_MODELS)
def test_what_is_no_model_is_refused_by_name(model: Any, clip: Any, vae: Any, value: Any) -> None:
    from qwenimage_lowvram.nodes.encode import QwenLowVRAMEncodePrompts
    from qwenimage_lowvram.nodes.encode_edit import QwenLowVRAMEncodeEditPrompt

    refused("model", lambda: sample(value))
    refused("clip", lambda: QwenLowVRAMEncodePrompts().encode(value, "a", " "))
    refused("clip", lambda: QwenLowVRAMEncodeEditPrompt().encode(value, vae, **EDIT))
    refused("vae", lambda: QwenLowVRAMEncodeEditPrompt().encode(clip, value, **EDIT))
    refused("vae", lambda: decode(value, empty_latent(), 0))


@pytest.mark.parametrize("value", [*NO_MODELS, [[1, 2]], [[None, None]]])
def test_a_negative_prompt_that_is_none_is_refused_without_guidance_too(model: Any, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="negative holds no prompt"):
        sample(model, negative=value, cfg=1.0)
    assert sample(model, negative=[], cfg=1.0)["result"][0]["samples"].isfinite().all()


@pytest.mark.parametrize("key", ["downscale_ratio_spacial", "downscale_ratio_temporal"])
@pytest.mark.parametrize("ratio", [0, -8, NAN, INFINITY, "8", [8], 1e6])
def test_an_empty_latents_ratio_that_is_none_is_refused(model: Any, key: str, ratio: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"latent_image: its {key} is .*a number from 1 to 64 is needed"):
        sample(model, latent_image={**empty_latent(), key: ratio})


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda tensor: tensor.to("meta")])
def test_tensors_without_numbers_are_refused(model: Any, vae: Any, change: Callable[[Any], Any]) -> None:
    latent = {"samples": change(empty_latent()["samples"])}
    for call in (
        lambda: sample(model, latent_image=latent),
        lambda: sample(model, positive=[[change(embeds(9, 1)), {}]]),
        lambda: sample(model, positive=cond(reference_latents=[latent["samples"]])),
        lambda: decode(vae, latent),
        lambda: vae.encode(change(torch.rand(1, 16, 16, 3))),
    ):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            call()


def test_an_image_of_numbers_that_overflow_is_refused_and_not_black(vae: Any) -> None:
    huge = {"samples": torch.full((1, 16, 1, 8, 8), 3e38)}
    for tile_size in (0, 64):
        with pytest.raises(InvalidRequest, match="The VAE's output holds numbers that are not finite"):
            decode(vae, huge, tile_size)


@cases(texts=("positive", "negative"))
def test_encode_prompts_refuses_values_by_name(clip: Any, name: str, value: Any) -> None:
    from qwenimage_lowvram.nodes.encode import QwenLowVRAMEncodePrompts

    refused(name, lambda: QwenLowVRAMEncodePrompts().encode(clip, **{"positive": "a", "negative": " ", name: value}))


@cases(whole=("tile_size",))
def test_decode_refuses_values_by_name(vae: Any, name: str, value: Any) -> None:
    refused(name, lambda: decode(vae, empty_latent(), value))


@cases(("strength",))
def test_load_lora_refuses_values_by_name(model: Any, name: str, value: Any) -> None:
    from qwenimage_lowvram.nodes.lora import QwenLowVRAMLoadLora

    refused(name, lambda: QwenLowVRAMLoadLora().load(model, "any.safetensors", value))


@cases(
    ("cfg", "vram_limit_gb", "ram_limit_gb"),
    ("width", "height", "batch_size", "steps", "prompt_tokens", "reference_pictures", "layers"),
)
def test_memory_plan_refuses_values_by_name(comfy: Any, name: str, value: Any) -> None:
    from qwenimage_lowvram.nodes.memory_plan import QwenLowVRAMMemoryPlan

    files = {"transformer": "a", "text_encoder": "a", "vae": "a", "weight_format": "auto"}
    refused(name, lambda: QwenLowVRAMMemoryPlan().plan(**files, **{**PLAN, name: value}))


@cases(
    ("vram_limit_gb", "ram_limit_gb"),
    choices=("dtype", "timesteps", "transformer_device", "text_encoder_device", "vae_device", "positions"),
)
def test_the_loader_refuses_values_by_name(comfy: Any, name: str, value: Any) -> None:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    files = {"transformer": "a", "text_encoder": "a", "vae": "a", "weight_format": "auto"}
    refused(name, lambda: QwenLowVRAMLoader().load(**files, **{**LOADER, name: value}))


@pytest.mark.parametrize("steps", [0, -1, 10_001, 10**12, NAN])
def test_a_schedule_of_no_or_endless_steps_is_refused(steps: Any) -> None:
    with pytest.raises(InvalidRequest, match="not possible"):
        qwen_sigmas(steps, 1024)


@pytest.mark.parametrize("denoise", [0.0, -1.0, 1e-9, NAN])
def test_a_schedule_of_endless_steps_before_the_first_is_refused(denoise: float) -> None:
    with pytest.raises(InvalidRequest, match="not possible"):
        lightning_sigmas(4, denoise=denoise)


@pytest.mark.parametrize("small", [1e-12, 5e-10])
def test_a_tiny_limit_is_a_limit(small: float) -> None:
    from qwenimage_lowvram.nodes.adapters.value_checks import limit_bytes

    assert limit_bytes(small) == 1
    assert limit_bytes(0) is limit_bytes(0.0) is None
    assert limit_bytes(1.5) == 3 * 2**29


def test_a_tiny_limit_is_refused_before_anything_is_loaded(make_transformer: Any) -> None:
    from qwenimage_lowvram.nodes.adapters.model import make_model

    model = make_model(make_transformer(), 1)
    with pytest.raises(DoesNotFit, match="VRAM limit of"):
        sample(model)
    assert model.model.transformer.store.fetched_blocks == 0
