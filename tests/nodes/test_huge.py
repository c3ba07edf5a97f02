"""Requests that no machine can grant are refused in words, quickly, and before anything is loaded."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import DoesNotFit, InvalidRequest
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.host_ram import HostRam, RamBound

from .conftest import cond, decode, embeds, empty_latent, sample
from .test_model import ksampler

GIB = 1024**3


@pytest.fixture
def little_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 1 GiB of free RAM."""
    ram = HostRam((RamBound("the system", 2 * GIB, GIB),))
    monkeypatch.setattr(HostRam, "now", classmethod(lambda cls: ram))


def test_a_huge_latent_is_refused_before_its_noise_is_made(model: Any, little_ram: None) -> None:
    huge = {"samples": torch.zeros(1, 16, 1, 1, 1).expand(8, 16, 1, 1024, 1024)}
    with pytest.raises(DoesNotFit, match="of RAM"):
        sample(model, latent_image=huge)


def test_huge_images_are_refused_before_they_are_made(vae: Any, little_ram: None) -> None:
    with pytest.raises(DoesNotFit, match=r"8 images of 8192x8192 px needs .* of RAM"):
        decode(vae, {"samples": torch.zeros(1, 16, 1, 1, 1).expand(8, 16, 1, 1024, 1024)})


def test_an_empty_latent_that_no_ram_holds_is_refused(clip: Any, vae: Any, little_ram: None) -> None:
    from qwenimage_lowvram.nodes.encode_edit import QwenLowVRAMEncodeEditPrompt

    with pytest.raises(DoesNotFit, match="64 images of 16384x16384 px"):
        QwenLowVRAMEncodeEditPrompt().encode(clip, vae, "a", "b", 1.0, 16384, 16384, 64, "auto")


def test_16384_px_are_refused_with_what_would_fit(model: Any) -> None:
    model.model.limit_bytes = GIB // 4
    start = time.monotonic()
    with pytest.raises(DoesNotFit, match=r"16384x16384.*\nUse 1328x1328") as caught:
        ksampler(model, cond(), cond(5, 2), empty_latent(16384, 16384))
    assert "The limit is vram_limit_gb" in str(caught.value)
    assert time.monotonic() - start < 60
    assert model.model.transformer.store.fetched_blocks == 0


def test_steps_whose_modulation_no_ram_holds_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = model.model.transformer.footprint.row_bytes
    ram = HostRam((RamBound("the system", GIB, 500 * rows),))
    monkeypatch.setattr(HostRam, "now", classmethod(lambda cls: ram))
    with pytest.raises(DoesNotFit, match=r"modulation of 1000 steps needs .*\nUse fewer steps"):
        ksampler(model, cond(), cond(5, 2), empty_latent(), steps=1000)


@pytest.mark.parametrize("positions", ["comfyui", "diffusers"])
def test_a_prompt_too_long_beside_its_image_is_refused_before_anything_is_loaded(
    make_transformer: Any, positions: str
) -> None:
    from qwenimage_lowvram.engine.models.qwen_image.positions import Positions
    from qwenimage_lowvram.nodes.adapters.model import make_model

    model = make_model(make_transformer(positions=Positions(positions)), None)
    with pytest.raises(InvalidRequest, match=r"4095 tokens.*Shorten"):
        ksampler(model, [[embeds(4095, 1), {}]], cond(5, 2), empty_latent())
    assert model.model.transformer.store.fetched_blocks == 0


def test_a_run_of_hours_is_warned_of(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qwenimage_lowvram.engine.runs import run_progress
    from qwenimage_lowvram.nodes.adapters import progress

    shown: list[str] = []
    monkeypatch.setattr(progress, "listens", lambda: True)
    monkeypatch.setattr(progress, "send", lambda event, data: shown.append(data.get("plan", "")))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(run_progress, "LONG_SECONDS", 0.0)
        ksampler(model, cond(), cond(5, 2), empty_latent(), steps=2)
    for text in (caplog.text, "".join(shown)):
        assert "This run will take about 0.0 hours (96x64 px, 2 steps" in text
    caplog.clear()
    shown.clear()
    ksampler(model, cond(), cond(5, 2), empty_latent(), steps=2)
    assert "will take about" not in caplog.text + "".join(shown)


# which limit is short


@pytest.mark.parametrize(
    ("limit", "free", "said"),
    [(None, 5, "No limit is set: .* are free on cuda:0"), (9, 5, "Of x .* are free"), (5, 5, "The limit is x in")],
)
def test_what_is_short_is_named(limit: int | None, free: int, said: str) -> None:
    from qwenimage_lowvram.nodes.adapters.limit_names import loader_limit

    card = torch.device("cuda:0")
    with pytest.raises(DoesNotFit, match=f"(?s)^It needs.*{said}"), loader_limit(limit, "x").naming(card, free):
        raise DoesNotFit("It needs more.", code="test.needs_more")


def test_on_the_cpu_the_ram_limit_is_named_where_it_is_the_short_one(small_pipeline: Path, comfy: Any) -> None:
    from qwenimage_lowvram.nodes.adapters.limit_names import RAM_LIMIT, VRAM_LIMIT
    from qwenimage_lowvram.nodes.loader import _Limits

    cpu, card = torch.device("cpu"), torch.device("cuda:0")
    assert _Limits(2, 1).name_on(cpu) == _Limits(None, 1).name_on(cpu) == RAM_LIMIT
    assert _Limits(1, 2).name_on(cpu) == _Limits(None, None).name_on(cpu) == VRAM_LIMIT
    assert _Limits(2, 1).name_on(card) == VRAM_LIMIT


def test_encoding_and_decoding_name_the_short_limit(clip: Any, small_pipeline: Path) -> None:
    from qwenimage_lowvram.nodes.adapters.vae import make_vae

    clip.limit_bytes, clip.limit_name = 1, "ram_limit_gb"
    with pytest.raises(DoesNotFit, match="The limit is ram_limit_gb"):
        clip.encode_prompts(["a cat"])
    checkpoint = open_checkpoint(small_pipeline / "vae")
    small = make_vae(checkpoint, dtype=torch.float32, limit_bytes=1, limit_name="ram_limit_gb")
    with pytest.raises(DoesNotFit, match="The limit is ram_limit_gb"):
        small.decode(torch.zeros(1, 16, 1, 8, 8))


def test_sampling_names_the_ram_limit_where_that_is_short(model: Any) -> None:
    model.model.ram_limit_bytes = 1
    with pytest.raises(DoesNotFit, match="a RAM limit of") as caught:
        ksampler(model, cond(), cond(5, 2), empty_latent())
    assert "VRAM limit" not in str(caught.value)
    assert "No limit is set" not in str(caught.value)


# interrupted within a block


@pytest.fixture
def interrupted() -> Iterator[Callable[[float], None]]:
    """`interrupted(seconds)` presses Cancel after so many seconds."""
    import comfy.model_management as management

    timers: list[threading.Timer] = []

    def press(seconds: float) -> None:
        timers.append(threading.Timer(seconds, management.interrupt_current_processing))
        timers[-1].start()

    yield press
    for timer in timers:
        timer.cancel()
    management.interrupt_current_processing(False)


def seconds_of(work: Callable[[], Any]) -> float:
    from comfy.model_management import InterruptProcessingException

    start = time.monotonic()
    with pytest.raises(InterruptProcessingException):
        work()
    return time.monotonic() - start


def test_a_huge_image_is_interrupted_within_a_block(model: Any, interrupted: Callable[[float], None]) -> None:
    interrupted(3.0)
    assert seconds_of(lambda: ksampler(model, cond(), cond(5, 2), empty_latent(8192, 8192), steps=1)) < 20
    assert model.model.last_report.passes == 0
    assert torch.isfinite(ksampler(model, cond(), cond(5, 2), empty_latent(), steps=1)).all()


def test_decoding_a_huge_image_is_interrupted_before_its_first_tile(
    vae: Any, interrupted: Callable[[float], None]
) -> None:
    interrupted(3.0)
    assert seconds_of(lambda: vae.decode(torch.zeros(1, 16, 1, 512, 512))) < 20
