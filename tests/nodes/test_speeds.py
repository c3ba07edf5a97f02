"""Speeds are measured once for a device and a disk, and remembered in ComfyUI's user folder."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import MissingFile
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.planning.forecast import Speeds
from qwenimage_lowvram.engine.runs.known_speeds import VERSION

CPU = Hardware.detect(torch.device("cpu"))


@pytest.fixture
def known(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`known(dtype)`; ComfyUI's user folder is a new one."""
    import folder_paths
    from qwenimage_lowvram.nodes.adapters.known_speeds import known_speeds

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path / "user"))
    model = tmp_path / "models" / "model.safetensors"
    model.parent.mkdir()
    model.write_bytes(b"\0" * 10_000_000)
    return lambda dtype=torch.float32: known_speeds(CPU, dtype, model)


def remembered(tmp_path: Path) -> Path:
    return tmp_path / "user" / "qwen_lowvram" / "speeds.json"


def test_what_is_measured_once_is_the_same_the_next_time(known: Any, tmp_path: Path) -> None:
    first = known().get()
    assert known().get() == first
    assert len(json.loads(remembered(tmp_path).read_text())) == 3  # version, device, disk
    assert known(torch.bfloat16).get().disk_bytes == first.disk_bytes
    assert len(json.loads(remembered(tmp_path).read_text())) == 4


@pytest.mark.skipif(os.name == "nt", reason="Windows makes links for administrators only")
def test_a_model_file_that_is_gone_when_it_is_measured_is_named(known: Any, tmp_path: Path) -> None:
    model = tmp_path / "models" / "model.safetensors"
    model.unlink()
    model.symlink_to(model)  # a link to itself
    with pytest.raises(MissingFile, match=model.name):
        known().get()


def test_corrections_are_kept(known: Any) -> None:
    known().get()
    known().put(Speeds(1.0, 2.0, 3.0))
    assert known().get() == Speeds(1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    "damage", ["", "[1]", '{"version": 1}', f'{{"version": {VERSION}, "cpu, float32": {{"flops": -1}}}}', "{"]
)
def test_a_damaged_file_is_measured_anew(damage: str, known: Any, tmp_path: Path) -> None:
    remembered(tmp_path).parent.mkdir(parents=True)
    remembered(tmp_path).write_text(damage)
    assert known().get().flops > 1e7
    assert json.loads(remembered(tmp_path).read_text())["version"] == VERSION


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among files")
def test_a_pipe_in_its_place_is_left_alone_and_holds_nobody_up(known: Any, tmp_path: Path) -> None:
    remembered(tmp_path).parent.mkdir(parents=True)
    os.mkfifo(remembered(tmp_path))
    found: list[Speeds] = []
    thread = threading.Thread(target=lambda: found.append(known().get()), daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it waits for a pipe"
    assert remembered(tmp_path).is_fifo()


def test_a_folder_that_cannot_be_written_costs_a_warning(
    known: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "user").write_text("a file where the folder should be")
    assert known().get().flops > 1e7
    assert "Speeds are not remembered" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="Windows makes links for administrators only")
def test_a_link_to_itself_in_the_models_place_keeps_the_speeds_of_its_folder(
    comfy: Any, known: Any, tmp_path: Path
) -> None:
    speeds = known().get()
    model = tmp_path / "models" / "model.safetensors"
    model.unlink()
    model.symlink_to(model)
    assert known().get() == speeds
