"""Prompts that were encoded once come from the disk: the encoder is not opened, and the result is the same."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.caches.prompt_cache import PromptCache
from qwenimage_lowvram.engine.errors import MissingFile
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer

FIRST, SECOND = "a sign that says hello", "白色背景上的红色圆形"


@pytest.fixture
def folder(small_pipeline: Path, tmp_path: Path) -> Path:
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(small_pipeline / part, tmp_path / "pipeline" / part)
    return tmp_path / "pipeline"


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    return PromptCache(tmp_path / "models" / "prompts")


@pytest.fixture
def load(folder: Path, cache: PromptCache, comfy: Any) -> Callable[..., Any]:
    """`load(**options)` -> our CLIP as a new process has it; kept=None: without the cache."""
    from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP

    def make(dtype: torch.dtype = torch.float32, *, kept: PromptCache | None = cache) -> Any:
        hardware = Hardware.detect(torch.device("cpu"))
        encoder = TextEncoder(open_checkpoint(folder / "text_encoder"), dtype=dtype, hardware=hardware)
        return LowVRAMCLIP(encoder, PromptTokenizer(folder / "tokenizer"), None, kept=kept)

    return make


def conds(clip: Any, *prompts: str) -> list[torch.Tensor]:
    return [conditioning[0][0] for conditioning in clip.encode_prompts(list(prompts))]


def by_comfyui(clip: Any, prompt: str) -> torch.Tensor:
    """What ComfyUI's own CLIP Text Encode node makes."""
    import nodes

    return nodes.CLIPTextEncode().encode(clip, prompt)[0][0][0]


def same_bits(ours: torch.Tensor, other: torch.Tensor) -> bool:
    return (ours.shape, ours.dtype, ours.device, ours.is_contiguous()) == (
        other.shape,
        other.dtype,
        other.device,
        other.is_contiguous(),
    ) and torch.equal(ours.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_kept_prompt_equals_a_fresh_one_bit_for_bit(dtype: torch.dtype, load: Callable[..., Any]) -> None:
    fresh = conds(load(dtype, kept=None), FIRST, SECOND)
    made = conds(load(dtype), FIRST, SECOND)
    again = load(dtype)
    kept = conds(again, FIRST, SECOND)
    assert again.encoder.fetched_bytes == 0
    for one, other, third in zip(fresh, made, kept, strict=True):
        assert same_bits(one, other)
        assert same_bits(one, third)


def test_kept_prompts_need_no_file_of_the_encoder(load: Callable[..., Any], folder: Path) -> None:
    expected = conds(load(), FIRST, SECOND)
    clip = load()
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    weights.unlink()
    kept = conds(clip, FIRST, SECOND)
    assert all(same_bits(one, other) for one, other in zip(expected, kept, strict=True))
    with pytest.raises(MissingFile):
        conds(clip, FIRST, "a new prompt")


def test_of_two_prompts_only_the_missing_one_is_encoded(load: Callable[..., Any], cache: PromptCache) -> None:
    expected = conds(load(kept=None), FIRST, SECOND, "three")
    conds(load(), SECOND)
    clip = load()
    encoded: list[list[int]] = []
    encode = clip.encoder.encode

    def listen(ids: Any, **options: Any) -> Any:
        encoded.extend(ids)
        return encode(ids, **options)

    clip.encoder.encode = listen
    got = conds(clip, FIRST, SECOND, "three")
    assert encoded == [clip.tokenizer.encode(FIRST), clip.tokenizer.encode("three")]
    assert all(same_bits(one, other) for one, other in zip(expected, got, strict=True))
    assert len(cache.entries()) == 3


def test_the_missing_prompts_are_encoded_in_one_visit(load: Callable[..., Any]) -> None:
    clip = load()
    conds(clip, "one")
    single = clip.encoder.fetched_bytes
    conds(clip, "one", "two", "three")
    assert single > 0
    assert clip.encoder.fetched_bytes == 2 * single


def test_comfyuis_text_node_and_ours_share_what_is_kept(load: Callable[..., Any]) -> None:
    (ours,) = conds(load(), FIRST)
    clip = load()
    assert same_bits(by_comfyui(clip, FIRST), ours)
    assert clip.encoder.fetched_bytes == 0
    theirs = by_comfyui(clip, SECOND)
    clone = load().clone()
    assert same_bits(conds(clone, SECOND)[0], theirs)
    assert clone.encoder.fetched_bytes == 0


def test_another_dtype_or_another_file_encodes_again(load: Callable[..., Any], folder: Path) -> None:
    conds(load(), FIRST)
    halved = load(torch.bfloat16)
    conds(halved, FIRST)
    assert halved.encoder.fetched_bytes > 0
    os.utime(next((folder / "text_encoder").glob("*.safetensors")), (1, 1))
    changed = load()
    conds(changed, FIRST)
    assert changed.encoder.fetched_bytes > 0


def test_a_damaged_entry_is_encoded_again_with_a_warning(
    load: Callable[..., Any], cache: PromptCache, caplog: pytest.LogCaptureFixture
) -> None:
    expected = conds(load(), FIRST)
    (entry,) = cache.entries()
    with entry.path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff")
    clip = load()
    with caplog.at_level(logging.WARNING):
        assert same_bits(conds(clip, FIRST)[0], expected[0])
    assert [record.getMessage() for record in caplog.records if str(entry.path) in record.getMessage()]
    assert clip.encoder.fetched_bytes > 0
    assert same_bits(conds(load(), FIRST)[0], expected[0])
    (again,) = cache.entries()
    assert again.path == entry.path


def test_a_folder_that_cannot_be_written_to_costs_no_image(
    load: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "models").write_text("a file")
    clip = load()
    with caplog.at_level(logging.WARNING):
        got = conds(clip, FIRST)
    assert same_bits(got[0], conds(load(kept=None), FIRST)[0])
    assert any("not kept" in record.getMessage() for record in caplog.records)


def test_a_changed_conditioning_leaves_what_is_kept_alone(load: Callable[..., Any]) -> None:
    clip = load()
    first, second = conds(clip, FIRST, FIRST)
    expected = first.clone()
    first.zero_()
    assert same_bits(second, expected)
    third = conds(clip, FIRST)[0]
    third.zero_()
    assert same_bits(conds(clip, FIRST)[0], expected)


def test_the_loader_keeps_prompts_in_comfyuis_models_folder(small_pipeline: Path, comfy: Any) -> None:
    import folder_paths
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    models = Path(folder_paths.models_dir)
    shutil.rmtree(models / "qwen_lowvram", ignore_errors=True)  # of other tests
    shutil.copytree(small_pipeline, models / "diffusers" / "kept_prompts")
    choices = {"transformer": "kept_prompts (folder)", "text_encoder": "from the folder", "vae": "from the folder"}
    settings = {"dtype": "fp32", "weight_format": "auto", "vram_limit_gb": 0.0, "timesteps": "fp32"}
    try:
        first = QwenLowVRAMLoader().load(**choices, **settings)[1]
        assert not (models / "qwen_lowvram").exists()
        expected = conds(first, FIRST)
        assert len(list((models / "qwen_lowvram" / "prompts").glob("*.safetensors"))) == 1
        second = QwenLowVRAMLoader().load(**choices, **settings)[1]
        assert same_bits(conds(second, FIRST)[0], expected[0])
        assert second.encoder.fetched_bytes == 0
    finally:
        shutil.rmtree(models / "diffusers" / "kept_prompts")
        shutil.rmtree(models / "qwen_lowvram", ignore_errors=True)
