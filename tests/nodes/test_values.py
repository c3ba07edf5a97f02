"""Values that no widget gives, and texts that nobody expects: refused by name, or shown as they are."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import InvalidRequest, QwenLowVRAMError
from safetensors.torch import save_file

from .conftest import cond, embeds, empty_latent
from .test_model import ksampler

NUMBERS = [math.nan, math.inf, -math.inf, -1.0, None, "1", True, [1.0]]


def sample(model: Any, **changes: Any) -> Any:
    from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

    inputs = {
        "positive": cond(), "negative": cond(5, 2), "latent_image": empty_latent(), "seed": 1, "steps": 1, "cfg": 4.0,
        "sampler": "euler", "scheduler": "qwen_image", "denoise": 1.0, "norm_rescale": True,
    }  # fmt: skip
    return QwenLowVRAMSample().sample(model, **inputs | changes)


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["steps", "cfg", "denoise"])
def test_a_number_that_sample_cannot_take_is_refused_by_its_name(name: str, value: Any, model: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name} is .*\n\nWhat to do: set {name}"):
        sample(model, **{name: value})


@pytest.mark.parametrize("denoise", [1e-9, 0.0, 0.009, 1.001])
def test_a_denoise_that_would_make_a_schedule_without_end_is_refused(denoise: float, model: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^denoise is .*from 0.01 to 1.0 is needed"):
        sample(model, denoise=denoise)


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["vram_limit_gb", "ram_limit_gb"])
def test_a_limit_that_is_none_is_refused_before_any_file_is_looked_at(name: str, value: Any, comfy: Any) -> None:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader
    from qwenimage_lowvram.nodes.memory_plan import QwenLowVRAMMemoryPlan

    files = {"transformer": "none", "text_encoder": "none", "vae": "none"}
    limits = {"vram_limit_gb": 0.0, "ram_limit_gb": 0.0} | {name: value}
    with pytest.raises(InvalidRequest, match=rf"^{name} is "):
        QwenLowVRAMLoader().load(**files, dtype="auto", weight_format="auto", timesteps="fp32", **limits)
    numbers = {"width": 64, "height": 64, "batch_size": 1, "steps": 1, "cfg": 1.0, "prompt_tokens": 9}
    with pytest.raises(InvalidRequest, match=rf"^{name} is "):
        QwenLowVRAMMemoryPlan().plan(**files, weight_format="auto", **numbers, **limits)


def test_next_to_nothing_is_a_limit_too(comfy: Any) -> None:
    from qwenimage_lowvram.nodes.adapters.checks import limit_bytes

    assert limit_bytes(0.0) is None
    assert limit_bytes(1e-12) == 1
    assert limit_bytes(1.5) == 1.5 * 2**30


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_a_lora_strength_that_is_none_is_refused(value: Any, model: Any) -> None:
    from qwenimage_lowvram.nodes.lora import QwenLowVRAMLoadLora

    if value == -1.0:
        return  # which takes the LoRA away
    with pytest.raises(InvalidRequest, match=r"^strength is "):
        QwenLowVRAMLoadLora().load(model, "none", value)


LATENTS: dict[str, Any] = {
    "no dict": None,
    "nothing": {},
    "no tensor": {"samples": [1]},
    "no image": {"samples": torch.zeros(0, 16, 1, 8, 12)},
    "no pixel": {"samples": torch.zeros(1, 16, 1, 0, 12)},
    "a matrix": {"samples": torch.zeros(8, 12)},
    "integers": {"samples": torch.zeros(1, 16, 1, 8, 12, dtype=torch.int64)},
    "not a number": {"samples": torch.full((1, 16, 1, 8, 12), math.nan)},
    "infinite": {"samples": torch.full((1, 16, 1, 8, 12), math.inf)},
}


@pytest.mark.parametrize("latent", LATENTS.values(), ids=LATENTS.keys())
def test_what_is_no_latent_is_refused_by_every_node_of_ours(latent: Any, model: Any) -> None:
    from qwenimage_lowvram.nodes.decode import QwenLowVRAMDecode

    with pytest.raises(InvalidRequest, match=r"(?s)^latent_image .*What to do: "):
        sample(model, latent_image=latent)
    with pytest.raises(InvalidRequest, match=r"(?s)^samples .*What to do: "):
        QwenLowVRAMDecode().decode(latent, None, 0)


@pytest.mark.parametrize("name", ["no image", "no pixel", "not a number", "infinite"])
def test_what_is_no_latent_is_refused_under_comfyuis_samplers(name: str, model: Any) -> None:
    with pytest.raises(QwenLowVRAMError, match=r"(?s)What to do: "):
        ksampler(model, cond(), cond(5, 2), LATENTS[name])


PROMPTS: dict[str, Any] = {
    "none": [],
    "no tensor": [[None, {}]],
    "no tokens": [[torch.zeros(1, 0, 64), {}]],
    "a matrix": [[torch.zeros(9, 64), {}]],
    "not a number": [[torch.full((1, 9, 64), math.nan), {}]],
    "a reference without pixels": [[embeds(9, 1), {"reference_latents": [torch.zeros(1, 16, 1, 0, 8)]}]],
    "a reference that is not finite": [[embeds(9, 1), {"reference_latents": [torch.full((1, 16, 1, 8, 8), math.inf)]}]],
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("name", ["positive", "negative"])
def test_what_is_no_prompt_is_refused_by_its_name(name: str, prompt: Any, model: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"(?s){name}.*What to do: "):
        sample(model, **{name: prompt})


@pytest.mark.parametrize("prompt", [PROMPTS["none"], PROMPTS["not a number"]], ids=["none", "not a number"])
def test_what_is_no_prompt_is_refused_under_comfyuis_samplers(prompt: Any, model: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"(?s)positive conditioning.*What to do: "):
        ksampler(model, prompt, cond(5, 2), empty_latent())


@pytest.mark.parametrize(
    "image", [None, torch.zeros(1, 0, 8, 3), torch.zeros(8, 8), torch.full((1, 8, 8, 3), math.nan)]
)
def test_an_image_without_pixels_is_refused_by_its_name(image: Any, comfy: Any) -> None:
    from qwenimage_lowvram.nodes.encode_edit import QwenLowVRAMEncodeEditPrompt

    numbers = {"megapixels": 1.0, "width": 0, "height": 0, "batch_size": 1}
    encode = QwenLowVRAMEncodeEditPrompt().encode
    if image is not None:
        with pytest.raises(InvalidRequest, match=r"(?s)^image2 .*What to do: |not finite"):
            encode(None, None, "a", "b", **numbers, variant="auto", image1=None, image2=image)
    for name in numbers:
        with pytest.raises(InvalidRequest, match=f"^{name} is nan"):
            encode(None, None, "a", "b", **numbers | {name: math.nan}, variant="auto")


# texts


def test_half_a_character_and_a_book_are_refused_in_words(small_pipeline: Path) -> None:
    from qwenimage_lowvram.engine.text.prompts import PromptTokenizer

    tokenizer = PromptTokenizer(small_pipeline / "tokenizer")
    with pytest.raises(InvalidRequest, match=r"character 3 is one half of a character \('\\ud800'\)"):
        tokenizer.encode("ab\ud800c")
    with pytest.raises(InvalidRequest, match=r"(?s)has 1000000 characters.*shorten it"):
        tokenizer.encode("a" * 10**6)
    assert tokenizer.encode("a\x00b\x1b[31m\r\n")


KEY = "<img src=x onerror=alert(1)>\n\x1b[31m.lora_A.weight"


def test_keys_are_shown_as_they_are_and_change_no_log_and_no_page(
    model: Any, models: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenimage_lowvram.nodes.adapters import progress
    from qwenimage_lowvram.nodes.lora import QwenLowVRAMLoadLora

    layer = "transformer_blocks.0.attn.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 64), f"{layer}.lora_B.weight": torch.ones(64, 2)}
    save_file(tensors | {KEY: torch.ones(2, 2)}, tmp_path / "odd.safetensors")
    models("loras", str(tmp_path))
    sent: list[str] = []
    server = type("Server", (), {"client_id": "x", "send_progress_text": lambda self, text, *_: sent.append(text)})()
    monkeypatch.setattr(progress.PromptServer, "instance", server, raising=False)
    monkeypatch.setattr(progress, "executing_node_id", lambda: "7")
    with caplog.at_level(logging.INFO):
        text = QwenLowVRAMLoadLora().load(model, "odd.safetensors", 1.0)["result"][1]
    shown = "<img src=x onerror=alert(1)>\\n\\x1b[31m.lora_A.weight"
    assert f"not used: {shown}" in text
    assert "\x1b" not in caplog.text
    assert "&lt;img src=x onerror=alert(1)&gt;\\n\\x1b[31m.lora_A.weight" in sent[0]
    assert "<" not in sent[0]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_the_vae_refuses_numbers_that_are_none_under_comfyuis_nodes(number: float, small_pipeline: Path) -> None:
    from qwenimage_lowvram.engine.checkpoints.checkpoint import open_checkpoint
    from qwenimage_lowvram.nodes.adapters.vae import make_vae

    vae = make_vae(open_checkpoint(small_pipeline / "vae"), dtype=torch.float32, limit_bytes=None)
    with pytest.raises(InvalidRequest, match=r"The latent holds numbers that are not finite"):
        vae.decode(torch.full((1, 16, 1, 4, 4), number))
    with pytest.raises(InvalidRequest, match=r"The image holds numbers that are not finite"):
        vae.encode(torch.full((1, 32, 32, 3), number))


def test_what_cannot_be_printed_in_an_error_is_escaped() -> None:
    assert str(InvalidRequest("a\x1b[31m\ud800\x00b\n\nWhat to do: c")) == "a\\x1b[31m\\ud800\\x00b\n\nWhat to do: c"
