"""A file takes its place whole, also where a virus scanner or a network drive is in the way, and nothing else goes."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qwenimage_lowvram.engine.files import atomic_files
from qwenimage_lowvram.engine.files.atomic_files import UNFINISHED, Held, is_file, remove, remove_dead, whole_file

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among its files")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(waited))
    return waited


def failing(times: int) -> Callable[..., None]:
    """os.replace as it is where a scanner has the new file open: refused that many times."""
    replace, left = os.replace, [times]

    def attempt(*args: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        replace(*args)

    return attempt


def write(path: Path, data: bytes = b"whole", **options: Any) -> None:
    with whole_file(path, **options) as stream:
        stream.write(data)


@pytest.mark.parametrize("times", [1, 5])
def test_a_file_that_is_held_for_a_moment_takes_its_place(
    times: int, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", failing(times))
    write(tmp_path / "f.safetensors", mtime_s=1000, patience_s=10)
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]
    assert (tmp_path / "f.safetensors").read_bytes() == b"whole"
    assert len(waits) == times
    assert waits == sorted(waits)  # longer every time
    assert waits[-1] <= 1


def test_a_file_that_is_held_for_good_is_given_up_in_words(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", failing(10**9))
    with pytest.raises(Held, match="cannot access the file; it was whole, and tried for 10 s"):
        write(tmp_path / "f.safetensors", patience_s=10)
    assert 8 < sum(waits) <= 10
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_does_not_pass_is_not_waited_for(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "f.safetensors", patience_s=10)
    assert waits == []


def test_a_drive_that_gives_one_file_two_numbers_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat, count = Path.stat, [0]

    def numbered(path: Path, **options: Any) -> os.stat_result:
        count[0] += 1
        values = list(stat(path, **options))
        values[1] = count[0]  # st_ino
        return os.stat_result(values)

    monkeypatch.setattr(Path, "stat", numbered)
    thread = threading.Thread(target=write, args=(tmp_path / "f.safetensors",), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]


def test_names_that_are_always_taken_away_end_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def taken(path: Path, *args: Any, **options: Any) -> Any:
        stream = opened(path, *args, **options)
        path.unlink()
        return stream

    monkeypatch.setattr(Path, "open", taken)
    with pytest.raises(OSError, match="removed by another program as soon as they were made"):
        write(tmp_path / "f.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows locks by itself")
def test_a_name_that_another_process_locks_at_once_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, True])
    monkeypatch.setattr(atomic_files, "_lock", lambda stream: next(answers))
    write(tmp_path / "f.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="Windows locks by itself")
def test_a_disk_without_locks_keeps_what_is_being_written_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_files, "_lock", lambda stream: None)
    new, old = tmp_path / f"new{UNFINISHED}", tmp_path / f"old{UNFINISHED}"
    new.touch()
    old.touch()
    os.utime(old, (1, 1))
    remove_dead([new, old])
    assert list(tmp_path.iterdir()) == [new]
    write(tmp_path / "f.safetensors")


def make_odd(kind: str, path: Path) -> None:
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.with_name("elsewhere"))
        if kind == "a link to a file":
            path.with_name("elsewhere").write_bytes(b"mine")


odd = pytest.mark.parametrize(
    "kind", ["a folder", pytest.param("a pipe", marks=needs_pipes), "a link to a file", "a link to nothing"]
)


@odd
def test_what_is_no_file_is_neither_replaced_nor_taken_for_a_dead_one(kind: str, tmp_path: Path) -> None:
    for name in ("f.safetensors", f"f.01234567.safetensors{UNFINISHED}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make_odd(kind, tmp_path / name)
    before = {path: path.lstat() for path in tmp_path.iterdir()}
    assert not is_file(tmp_path / "f.safetensors")
    with pytest.raises(FileExistsError, match="not a plain file has this name; it is left alone"):
        write(tmp_path / "f.safetensors")
    remove_dead(sorted(tmp_path.glob(f"*{UNFINISHED}")))
    assert {path: path.lstat() for path in tmp_path.iterdir()} == before


def test_removing_goes_on_after_one_that_cannot_be_removed(tmp_path: Path) -> None:
    first, folder, last = (tmp_path / name for name in ("1", "2", "3"))
    first.touch()
    folder.mkdir()
    last.touch()
    removed = remove([first, folder, last, tmp_path / "gone"])
    assert removed.gone == (first, last, tmp_path / "gone")
    assert list(removed.failed) == [folder]
    assert removed.failed[folder]
    assert list(tmp_path.iterdir()) == [folder]
