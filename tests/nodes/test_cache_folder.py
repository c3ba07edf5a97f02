"""The cache lies where a person wants it; a models folder that is read-only costs keeping, not the run."""

import ctypes
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.caches.prompt_cache import PromptCache
from qwenimage_lowvram.engine.caches.prompt_key import PromptKey
from qwenimage_lowvram.engine.errors import CacheError
from qwenimage_lowvram.engine.files.atomic_files import may_write
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint

from .test_weight_cache import cache, fingerprint, load, pipeline

__all__ = ["pipeline"]

# Linux' capability.h: what lets root write to and read from anything
OVERRIDE_AND_SEARCH = 0b110
CAPABILITY_VERSION = 0x20080522
KEY = PromptKey("encoder", torch.float32, (1, 2), "cpu")


@pytest.fixture(autouse=True)
def _not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN_LOWVRAM_CACHE", raising=False)


@pytest.fixture
def bound_by_modes(tmp_path: Path) -> Iterator[None]:
    """This thread keeps to the modes of folders, also as root."""
    if sys.platform != "linux":
        pytest.skip("modes of folders as Linux has them")
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    effective = data[0]
    data[0] = effective & ~OVERRIDE_AND_SEARCH
    assert libc.capset(header, data) == 0
    yield
    data[0] = effective
    assert libc.capset(header, data) == 0


@pytest.fixture
def closed(bound_by_modes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache's folder, on what cannot be written to; its parent may be opened meanwhile."""
    import folder_paths

    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setenv("QWEN_LOWVRAM_CACHE", str(disk / "qwen_lowvram"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    disk.chmod(0o555)
    assert not may_write(disk)
    yield disk / "qwen_lowvram"
    disk.chmod(0o755)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for record in caplog.records if "cannot be written to" in (text := record.getMessage())]


def test_the_cache_lies_where_a_person_says(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths

    assert cache() == Path(folder_paths.models_dir) / "qwen_lowvram"
    models("qwen_lowvram", str(tmp_path / "yaml"))
    assert cache() == tmp_path / "yaml"
    for given, found in (
        (str(tmp_path / "a $HOME b"), tmp_path / "a $HOME b"),
        ("$ALL/mine", Path.cwd() / "$ALL/mine"),
        ("~nobody_of_this_name/kept", Path.cwd() / "~nobody_of_this_name/kept"),
        ("~/kept", Path.home() / "kept"),
        ("kept", Path.cwd() / "kept"),
        ("", tmp_path / "yaml"),
    ):
        monkeypatch.setenv("QWEN_LOWVRAM_CACHE", given)
        assert cache() == found


def test_weights_and_prompts_go_to_the_folder_of_the_variable(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths
    from qwenimage_lowvram.nodes.weight_cache import prompt_cache

    monkeypatch.setenv("QWEN_LOWVRAM_CACHE", str(tmp_path / "kept"))
    load("int8")
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert prompt_cache().folder == tmp_path / "kept" / "prompts"
    assert not (Path(folder_paths.models_dir) / "qwen_lowvram").exists()


def test_a_read_only_folder_costs_keeping_not_the_run(
    pipeline: Path, closed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert load("int8").weight_format == "bnb_int8"
    (made,) = (tmp_path / "temp").rglob("*.safetensors")
    (said,) = warned(caplog)
    assert said.startswith(f"{closed} cannot be written to")
    assert "QWEN_LOWVRAM_CACHE" in said
    caplog.clear()
    load("int8")  # it is there for the next load
    assert warned(caplog) == []
    assert fingerprint("int8").endswith("/0")
    made.unlink()
    assert fingerprint("int8").endswith("/1")  # and is missed when it goes
    assert list(closed.parent.iterdir()) == []


@pytest.mark.parametrize("damage", [False, True])
def test_what_a_read_only_folder_has_is_read_unless_it_is_damaged(
    damage: bool, pipeline: Path, closed: Path, tmp_path: Path
) -> None:
    closed.parent.chmod(0o755)
    load("int8")
    (file,) = closed.iterdir()
    if damage:
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    file.chmod(0o444)
    closed.chmod(0o555)
    assert load("int8").weight_format == "bnb_int8"
    assert bool(list(tmp_path.glob("temp/*/*"))) == damage
    closed.chmod(0o755)


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_what_is_no_folder_costs_keeping_not_the_run(kind: str, pipeline: Path, closed: Path, tmp_path: Path) -> None:
    closed.parent.chmod(0o755)
    closed.write_bytes(b"") if kind == "file" else closed.symlink_to(tmp_path / "gone")
    assert load("nf4").weight_format == "nf4"
    assert len(list((tmp_path / "temp").rglob("*.safetensors"))) == 1


def test_where_nothing_at_all_can_be_written_it_is_said(pipeline: Path, closed: Path, tmp_path: Path) -> None:
    (tmp_path / "temp").mkdir(mode=0o555)
    with pytest.raises(CacheError, match=r"(?s)cannot be written.*What to do"):
        load("int8")


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_prompts_that_cannot_be_kept_cost_a_warning(mode: int, closed: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = PromptCache(closed.parent / "prompts")
    closed.parent.chmod(mode)
    assert kept.get(KEY) is None
    kept.put(KEY, torch.zeros(1, 2, 4))
    assert ["cannot be written" in record.getMessage() for record in caplog.records] == [True]


def test_prompts_of_a_read_only_folder_are_read(closed: Path) -> None:
    kept = PromptCache(closed.parent / "prompts")
    closed.parent.chmod(0o755)
    kept.put(KEY, torch.ones(1, 2, 4))
    kept.folder.chmod(0o555)
    found = kept.get(KEY)
    assert found is not None
    assert torch.equal(found, torch.ones(1, 2, 4))
    kept.folder.chmod(0o755)


def test_fastest_makes_nothing_for_one_session(pipeline: Path, closed: Path) -> None:
    from qwenimage_lowvram.nodes.weight_formats import versions_of

    source = open_checkpoint(pipeline / "transformer")
    assert list(versions_of(source)) == ["as stored"]
    closed.parent.chmod(0o755)
    assert list(versions_of(source)) == ["as stored", "int8", "nf4"]


def test_trying_whether_a_folder_can_be_written_to_leaves_nothing(tmp_path: Path) -> None:
    assert may_write(tmp_path / "a" / "b")
    assert may_write(tmp_path)
    assert list(tmp_path.iterdir()) == []
