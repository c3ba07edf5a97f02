"""The loader quantizes at its first load, is interrupted like any node, and notices when its cache has been cleared."""

import asyncio
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import CacheError, InvalidRequest
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint

FOLDER = "from the folder"
NAME = "quantized_on_load"


@pytest.fixture
def pipeline(comfy: Any, small_pipeline: Path) -> Iterator[Path]:
    """The small pipeline among ComfyUI's own models, without anything in the cache."""
    import folder_paths

    shutil.rmtree(cache(), ignore_errors=True)  # of other tests
    folder = Path(folder_paths.models_dir) / "diffusers" / NAME
    shutil.copytree(small_pipeline, folder)
    os.utime(weights_in(folder))  # another source for each test
    yield folder
    shutil.rmtree(folder)
    shutil.rmtree(cache(), ignore_errors=True)


def weights_in(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def cache() -> Path:
    from qwenimage_lowvram.nodes.cache_folder import weight_cache_folder

    return weight_cache_folder()


def chosen(weight_format: str) -> dict[str, Any]:
    return {"transformer": f"{NAME} (folder)", "text_encoder": FOLDER, "vae": FOLDER, "weight_format": weight_format}


def load(weight_format: str) -> Any:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    settings = {"dtype": "fp32", "vram_limit_gb": 0.0, "timesteps": "fp32"}
    return QwenLowVRAMLoader().load(**chosen(weight_format), **settings)[0].model.transformer


def fingerprint(weight_format: str) -> str:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    return QwenLowVRAMLoader.IS_CHANGED(**chosen(weight_format), dtype="fp32")


def shown(action: str) -> str:
    from qwenimage_lowvram.nodes.weight_cache import QwenLowVRAMWeightCache

    answer = QwenLowVRAMWeightCache().run(action)
    assert answer["ui"]["text"] == [answer["result"][0]]
    assert answer["ui"]["parts"]
    return answer["result"][0]


def after_clearing(what: str) -> str:
    from qwenimage_lowvram.engine.told import text_of
    from qwenimage_lowvram.nodes.cache_report import cleared
    from qwenimage_lowvram.nodes.weight_cache import prompt_cache

    return text_of(cleared(cache(), prompt_cache(), what))


@pytest.mark.parametrize(
    ("weight_format", "codec"),
    [("fp8_e4m3fn_scaled", "fp8_e4m3fn_scaled"), ("int8", "bnb_int8"), ("nf4", "nf4"), ("fp4", "fp4")],
)
def test_the_loader_holds_blocks_in_the_chosen_format(weight_format: str, codec: str, pipeline: Path) -> None:
    plain = load("auto")
    assert not cache().exists()
    quantized = load(weight_format)
    assert (plain.weight_format, quantized.weight_format) == ("fp32", codec)
    assert quantized.store.raw_bytes < 0.3 * plain.store.raw_bytes
    (file,) = cache().iterdir()
    made = file.stat().st_ino, file.stat().st_mtime_ns
    assert load(weight_format).weight_format == codec
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == made


def with_forecasts(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    """As on a machine where a step in each format takes so long."""
    from qwenimage_lowvram.engine.planning.forecast import StepForecast
    from qwenimage_lowvram.engine.planning.format_choice import FormatChoice
    from qwenimage_lowvram.nodes import weight_formats as format_choice

    forecasts = {name: StepForecast(one, 0.0, 0.0, overlapped=True) for name, one in seconds.items()}
    choice = FormatChoice(min(seconds, key=lambda name: seconds[name]), forecasts)
    monkeypatch.setattr(format_choice, "choose_format", lambda *_: choice)


def test_auto_is_as_stored_whatever_is_free_and_says_what_would_be_faster(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    with_forecasts(monkeypatch, {"as stored": 9.0, "int8": 5.0, "nf4": 3.0})
    settings = {"dtype": "fp32", "vram_limit_gb": 0.0, "timesteps": "fp32"}
    for name in ("auto", "as stored"):
        model = QwenLowVRAMLoader().load(**chosen(name), **settings)[0].model
        assert model.transformer.weight_format == "fp32"
        assert "nf4 weights would take 3.0 s per step" in model.advice
        assert "instead of 9.0 s as stored" in model.advice
    assert not cache().exists()
    with_forecasts(monkeypatch, {"as stored": 4.0, "int8": 5.0, "nf4": 3.0})
    assert QwenLowVRAMLoader().load(**chosen("auto"), **settings)[0].model.advice == ""


@pytest.mark.parametrize("error", [OSError("gone"), torch.OutOfMemoryError(), MemoryError()], ids=repr)
def test_a_machine_that_cannot_be_measured_costs_the_advice_not_the_load(
    error: Exception, pipeline: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qwenimage_lowvram.engine.runs.known_speeds import KnownSpeeds
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(KnownSpeeds, "get", fail)
    settings = {"dtype": "fp32", "vram_limit_gb": 0.0, "timesteps": "fp32"}
    assert QwenLowVRAMLoader().load(**chosen("auto"), **settings)[0].model.advice == ""
    assert "No advice about weight_format" in caplog.text


def test_fastest_is_what_the_forecasts_say_and_tells_what_it_writes(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_forecasts(monkeypatch, {"as stored": 9.0, "int8": 5.0, "nf4": 3.0})
    with caplog.at_level(logging.INFO):
        assert load("fastest").weight_format == "nf4"
    assert f"Quantizing transformer to nf4, once: 0.0 GB in {cache()}" in caplog.text
    with_forecasts(monkeypatch, {"as stored": 2.0, "int8": 5.0, "nf4": 3.0})
    assert load("fastest").weight_format == "fp32"


def test_looking_at_the_inputs_quantizes_nothing(pipeline: Path) -> None:
    assert fingerprint("nf4") == fingerprint("auto")
    assert not cache().exists()


def test_linked_inputs_are_looked_at_when_they_are_known(pipeline: Path) -> None:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    assert asyncio.run(QwenLowVRAMLoader.VALIDATE_INPUTS(None)) is True
    assert QwenLowVRAMLoader.IS_CHANGED(**(chosen("nf4") | {"weight_format": None})) == fingerprint("auto")


def test_a_format_that_cannot_be_made_is_refused_before_anything_is_loaded(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequest, match=r"^weight_format: There is no weight_format 'nf5'"):
        load("nf5")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    monkeypatch.setattr("qwenimage_lowvram.nodes.loader.served_of", None)
    with pytest.raises(CacheError, match=r"^weight_format: .*and has 0.0 GB"):
        load("nf4")


def test_an_interruption_while_quantizing_leaves_nothing(pipeline: Path) -> None:
    import comfy.model_management as management

    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        load("nf4")
    assert list(cache().iterdir()) == []
    assert load("nf4").weight_format == "nf4"


def test_the_progress_bar_counts_the_blocks(pipeline: Path) -> None:
    import comfy.utils

    seen: list[tuple[int, int]] = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: seen.append((value, total)))
    try:
        load("nf4")
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert seen[0] == (0, 4)
    assert seen[-2:] == [(4, 4), (1, 1)]  # the last is of the loader itself: the file is open


def test_a_model_whose_cache_was_cleared_is_loaded_again(pipeline: Path) -> None:
    before = fingerprint("nf4")
    load("nf4")
    assert fingerprint("nf4") == before  # or every second run would load again
    after_clearing("all")
    after = fingerprint("nf4")
    assert after != before
    assert fingerprint("nf4") == after
    load("nf4")
    assert fingerprint("nf4") == after
    assert fingerprint("int8") == before


def test_the_node_lists_what_there_is_and_its_size(pipeline: Path) -> None:
    assert shown("show") == f"{cache()}: nothing\nprompts: none"
    load("nf4")
    load("int8")
    head, *lines, _ = shown("show").splitlines()
    assert head.startswith(f"{cache()}: 2 files, 0.00 GB")
    assert [line.split(", ")[:2] for line in lines] == [
        [f"{NAME}/transformer", "int8"],
        [f"{NAME}/transformer", "nf4"],
    ]
    assert all(line.endswith(", usable") for line in lines)


def test_clearing_removes_what_is_not_used_or_everything(pipeline: Path) -> None:
    load("nf4")
    os.utime(weights_in(pipeline), (1, 1))
    load("nf4")
    assert [line.rpartition(", ")[2] for line in shown("show").splitlines()[1:]].count("usable") == 1
    report = after_clearing("unused")
    assert "removed: 1 file" in report
    assert report.splitlines()[-1].endswith("its model file has changed")
    identity = open_checkpoint(pipeline / "transformer").identity
    (kept,) = cache().iterdir()
    assert identity in kept.name
    assert "removed: nothing" in after_clearing("unused")
    assert "removed: 1 file" in after_clearing("all")
    assert list(cache().iterdir()) == []


@pytest.mark.parametrize("action", ["clear unused", "clear all", "clear prompts"])
def test_a_graph_that_holds_an_old_value_that_clears_only_shows(action: str, pipeline: Path) -> None:
    from qwenimage_lowvram.nodes.weight_cache import QwenLowVRAMWeightCache

    load("nf4")
    os.utime(weights_in(pipeline), (1, 1))  # unused now
    files = list(cache().iterdir())
    assert action in QwenLowVRAMWeightCache.INPUT_TYPES()["required"]["action"][0]
    report = shown(action)
    assert list(cache().iterdir()) == files
    assert report.startswith(shown("show"))
    assert "Nothing was cleared" in report
    assert "POST /qwen_lowvram/clear" in report
    assert math.isnan(QwenLowVRAMWeightCache.IS_CHANGED(action))


def test_prompts_and_weights_are_cleared_apart(pipeline: Path) -> None:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader
    from qwenimage_lowvram.nodes.weight_cache import prompt_cache

    settings = {"dtype": "fp32", "vram_limit_gb": 0.0, "timesteps": "fp32"}
    clip = QwenLowVRAMLoader().load(**chosen("nf4"), **settings)[1]
    clip.encode_prompts(["a cat", " "])
    nbytes = sum(entry.nbytes for entry in prompt_cache().entries())
    count = f"prompts: 2, {nbytes / 1e6:.1f} MB"
    assert shown("show").splitlines()[-1] == count
    for what in ("unused", "all"):
        assert count in after_clearing(what).splitlines()
    assert len(prompt_cache().entries()) == 2
    load("nf4")
    report = after_clearing("prompts")
    assert report.startswith(f"{cache()}: 1 file, ")
    assert report.endswith(f"prompts: none\n\nremoved {count}")
    assert prompt_cache().entries() == []
    assert after_clearing("prompts").endswith("removed prompts: none")


def test_one_that_cannot_be_removed_is_named_and_the_others_go(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("nf4")
    load("int8")
    (held,) = cache().glob("*.int8.*")
    unlink = Path.unlink

    def refused(path: Path, **options: Any) -> None:
        if path == held:
            raise PermissionError(13, "The process cannot access the file")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refused)
    report = after_clearing("all").splitlines()
    assert "removed: 1 file, 0.00 GB" in report
    assert report[-1].startswith(f"not removed (The process cannot access the file): {NAME}/transformer, int8, ")
    assert report[0].startswith(f"{cache()}: 1 file, ")
    assert list(cache().iterdir()) == [held]


def test_odd_names_and_records_are_shown_as_one_line_each(pipeline: Path) -> None:
    name = "a\nb.nf4.0123456789abcdef.safetensors"
    record = {"quantized_by": "qwenimage_lowvram", "source": "/x/a\0\ud800\nb.safetensors", "weight_format": "n\r4"}
    raw = json.dumps({"__metadata__": record}).encode()
    cache().mkdir(parents=True)
    (cache() / "c.nf4.0123456789abcdef.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    (cache() / "d.nf4.0123456789abcdef.safetensors").mkdir()
    if os.name != "nt":
        (cache() / name).write_bytes(b"damaged")
    os.utime(cache() / "c.nf4.0123456789abcdef.safetensors", (10**10, 10**10))
    text = shown("show")
    assert all(c == "\n" or c.isprintable() for c in text)
    json.dumps(text).encode()
    _, *lines, _ = text.splitlines()
    assert len(lines) == len(list(cache().iterdir()))
    assert lines[-2].startswith("a\\x00\\ud800\\nb.safetensors, n\\r4, 0.00 GB, ")
    assert lines[-2].endswith("its model file is gone")
    assert lines[-1].endswith("not this pack's file, left alone")


def test_what_is_no_file_among_the_prompts_is_shown(pipeline: Path) -> None:
    name = f"{'0' * 32}.safetensors"
    (cache() / "prompts" / name).mkdir(parents=True)
    assert shown("show").splitlines()[1:] == ["prompts: none", f"prompts/{name}, not this pack's file, left alone"]
    assert "removed prompts: none" in after_clearing("prompts")
    assert (cache() / "prompts" / name).is_dir()


def test_a_folder_that_cannot_be_read_is_a_line_and_no_error(pipeline: Path) -> None:
    cache().mkdir(parents=True)
    (cache() / "prompts").write_bytes(b"no folder")
    first, second = shown("show").splitlines()
    assert first == f"{cache()}: nothing"
    assert "cannot be read" in second
    assert "cannot be cleared" in after_clearing("prompts")
    (cache() / "prompts").unlink()
