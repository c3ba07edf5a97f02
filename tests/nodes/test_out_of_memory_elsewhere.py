"""Memory that runs out in the encoder, the VAE and while weights are quantized: smaller, or in words; and ComfyUI's
list may hold what is gone."""

import gc
import logging
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import QwenLowVRAMError, Unsupported
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.host_ram import HostRam, RamBound
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image_vae.image_vae import ImageVAE
from qwenimage_lowvram.engine.out_of_memory import OutOfMemory, OutOfRam, Short, ran_out
from qwenimage_lowvram.engine.streaming.pinned_memory import PinnedMemory

from .test_host_memory import on_card, run
from .test_weight_cache import load, pipeline

__all__ = ["pipeline"]
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    torch.OutOfMemoryError(""),
    RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
]


class Fails:
    """Raises at its first `count` calls, then does what was to be done."""

    def __init__(self, action: Any, error: BaseException, count: int) -> None:
        self.action, self.error, self.left, self.calls = action, error, count, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(kwargs)
        if self.left:
            self.left -= 1
            raise self.error
        return self.action(*args, **kwargs)


@pytest.fixture
def clip(small_pipeline: Path, comfy: Any) -> Any:
    from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer
    from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP

    encoder = TextEncoder(
        open_checkpoint(small_pipeline / "text_encoder"),
        dtype=torch.float32,
        hardware=Hardware.detect(torch.device("cpu")),
    )
    return LowVRAMCLIP(encoder, PromptTokenizer(small_pipeline / "tokenizer"), None)


@pytest.mark.parametrize("error", ERRORS, ids=range(len(ERRORS)))
def test_an_encoder_without_memory_encodes_once_more_through_one_slot(
    error: BaseException, clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = clip.tokenize("a cup")
    expected = clip.encode_from_tokens(tokens)
    encode = Fails(clip.encoder.encode, error, 1)
    monkeypatch.setattr(clip.encoder, "encode", encode)
    assert torch.equal(clip.encode_from_tokens(tokens), expected)
    assert [call["slots"] for call in encode.calls] == [2, 1]


@pytest.mark.parametrize("error", ERRORS, ids=range(len(ERRORS)))
def test_an_encoder_that_finds_no_memory_at_all_says_so(
    error: BaseException, clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip.encoder, "encode", Fails(clip.encoder.encode, error, 9))
    with pytest.raises((OutOfMemory, OutOfRam), match=r"ran out while prompts were encoded: .+\n\nWhat to do: "):
        clip.encode_from_tokens(clip.tokenize("a cup"))


def test_another_error_of_the_encoder_is_its_own(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Fails(clip.encoder.encode, RuntimeError(""), 9)
    monkeypatch.setattr(clip.encoder, "encode", encode)
    with pytest.raises(RuntimeError) as caught:
        clip.encode_from_tokens(clip.tokenize("a cup"))
    assert caught.value is encode.error
    assert len(encode.calls) == 1


@pytest.fixture
def vae(small_pipeline: Path) -> ImageVAE:
    from qwenimage_lowvram.nodes.adapters.vae import make_vae

    image_vae: ImageVAE = make_vae(
        open_checkpoint(small_pipeline / "vae"), dtype=torch.float32, limit_bytes=None
    ).first_stage_model
    return image_vae


@pytest.mark.parametrize("error", ERRORS, ids=range(len(ERRORS)))
def test_a_vae_without_memory_takes_smaller_tiles_until_there_are_none(error: BaseException, vae: ImageVAE) -> None:
    latents = torch.randn(1, 16, 1, 40, 60, generator=torch.Generator().manual_seed(1))
    expected = vae.decode(latents)
    tick = Fails(lambda *_: None, error, 1)
    assert (vae.decode(latents, on_tile=tick) - expected).abs().max() < 1e-5
    with pytest.raises((OutOfMemory, OutOfRam), match=r"ran out in the smallest tiles of the VAE .+\n\nWhat to do: "):
        vae.decode(latents, on_tile=Fails(None, error, 10**9))


def test_blocks_that_find_no_ram_are_read_from_the_file(
    model: Any, small_pipeline: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(model)
    streamed = on_card(small_pipeline, blocks_in_ram=3)
    take = PinnedMemory.take
    stored = streamed.model.transformer.footprint.stored_bytes

    refusals = iter([MemoryError()])  # to the first block that is to be held

    def refuse(self: PinnedMemory, nbytes: int, **options: Any) -> Any:
        if nbytes == stored and (error := next(refusals, None)):
            raise error
        return take(self, nbytes, **options)

    monkeypatch.setattr(PinnedMemory, "take", refuse)
    assert torch.equal(run(streamed), expected)
    assert any("There is no RAM for more than 0 held blocks (MemoryError)" in r.getMessage() for r in caplog.records)


def test_weights_that_find_no_memory_are_not_quantized_and_it_is_said(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenimage_lowvram.engine.caches.requantized_weights import RequantizedWeights

    monkeypatch.setattr(RequantizedWeights, "make", Fails(None, MemoryError(), 9))
    with pytest.raises(OutOfRam, match="RAM ran out while the model was loaded: MemoryError"):
        load("int8")


def test_a_card_too_small_to_quantize_leaves_it_to_the_cpu(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qwenimage_lowvram.engine.caches.requantized_weights import RequantizedWeights
    from qwenimage_lowvram.nodes import weight_cache

    make = RequantizedWeights.make
    devices = []

    def on(self: RequantizedWeights, device: torch.device, *args: Any) -> Any:
        devices.append(device.type)
        if device.type == "meta":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return make(self, device, *args)

    monkeypatch.setattr(RequantizedWeights, "make", on)
    monkeypatch.setattr(weight_cache, "stage_bytes", lambda *_: 1 << 60)
    card = Hardware.detect(torch.device("meta"))
    weight_cache.in_weight_format(open_checkpoint(pipeline / "transformer"), "int8", card, None)
    assert devices == ["meta", "cpu"]
    assert any("again on the CPU" in record.getMessage() for record in caplog.records)


def test_the_words_name_what_ran_out_and_the_limit_that_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    container = RamBound("control group /a", 8 << 30, 1 << 29)
    monkeypatch.setattr(HostRam, "now", lambda: HostRam((RamBound("the system", 256 << 30, 200 << 30), container)))
    of_ram = ran_out("while it ran", Short.HOST, "why")
    assert "RAM ran out while it ran: why; control group /a leaves 0.5 of 8.0 GiB now." in str(of_ram)
    assert isinstance(of_ram, QwenLowVRAMError)
    assert not isinstance(of_ram, torch.OutOfMemoryError)  # ComfyUI would say that the GPU's ran out
    of_card = ran_out("while it ran", Short.DEVICE, "why")
    assert "The card's memory ran out while it ran: why.\n" in str(of_card)
    assert isinstance(of_card, QwenLowVRAMError)
    assert isinstance(of_card, torch.OutOfMemoryError)


def page_file_error() -> OSError:
    error = OSError(22, "The paging file is too small for this operation to complete")
    error.winerror = 1455  # type: ignore[attr-defined]
    return error


def of_diffusers() -> RuntimeError:
    error = RuntimeError("Failed to import diffusers.models because of the following error")
    error.__cause__ = page_file_error()
    return error


@pytest.mark.parametrize("place", ["source", "cache file", "tokenizer", "small weights", "import"])
def test_windows_page_file_is_named_wherever_it_ends_loading(
    place: str, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenimage_lowvram.nodes import sources

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise of_diffusers() if place == "import" else page_file_error()

    target = {
        "source": "qwenimage_lowvram.engine.caches.requantized_weights.TensorReader.read_into",
        "cache file": "qwenimage_lowvram.engine.files.atomic_files._claim",
        "tokenizer": "qwenimage_lowvram.engine.files.json_texts.open_regular",
        "small weights": "qwenimage_lowvram.engine.streaming.block_source.open_regular",
        "import": "qwenimage_lowvram.engine.packages.importlib",
    }[place]
    sources._tokenizer.cache_clear()
    monkeypatch.setattr(target, SimpleNamespace(import_module=fails) if place == "import" else fails)
    with pytest.raises(OutOfRam, match=r"while the model was loaded: .*the page file is too small\. Enlarge it"):
        load("int8")


def test_fp8_is_not_made_for_a_device_that_cannot_decode_it(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenimage_lowvram.nodes.weight_cache import in_weight_format

    monkeypatch.setenv("QWEN_LOWVRAM_CACHE", str(tmp_path / "cache"))
    apple = replace(Hardware.detect(torch.device("cpu")), decodes_fp8=False)
    source = open_checkpoint(pipeline / "transformer")
    with pytest.raises(Unsupported, match="F8_E4M3, which cannot be decoded"):
        in_weight_format(source, "fp8_e4m3fn_scaled", apple, None)
    assert not (tmp_path / "cache").exists()
    assert in_weight_format(source, "int8", apple, None).identity != source.identity


def test_what_is_gone_from_comfyuis_list_is_not_asked(
    comfy: Any, make_transformer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.model_management as management
    from qwenimage_lowvram.nodes.adapters.limits import could_be_free, stage_bytes
    from qwenimage_lowvram.nodes.adapters.model import make_model

    caplog.set_level(logging.ERROR)
    cpu = torch.device("cpu")
    patcher = make_model(make_transformer(), None)
    kept = patcher.model  # somebody holds the network, nobody the patcher
    entry = management.LoadedModel(patcher)
    entry.real_model = weakref.ref(kept)
    del patcher
    gc.collect()
    assert entry.model is None
    monkeypatch.setattr(management, "current_loaded_models", [entry])
    assert could_be_free(cpu)[0] > 0
    assert stage_bytes(cpu, None, 1 << 20) > 0
    assert stage_bytes(cpu, 1 << 30, 1 << 20) > 0


def test_a_container_bounds_what_a_stage_on_the_cpu_may_hold(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenimage_lowvram.nodes.adapters.limits import headroom_bytes, stage_bytes

    system, container = RamBound("the system", 256 << 30, 200 << 30), RamBound("a group", 8 << 30, 5 << 30)
    monkeypatch.setattr(HostRam, "now", lambda: HostRam((system, container)))
    monkeypatch.setattr(
        "comfy.model_management.psutil.virtual_memory", lambda: SimpleNamespace(available=200 << 30, total=256 << 30)
    )
    assert stage_bytes(torch.device("cpu"), None, 64 << 30) == (5 << 30) - headroom_bytes()
