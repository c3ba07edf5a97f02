"""Headers are read once as long as their files stay as they are, within bounds, and never for another file."""

import json
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from qwenimage_lowvram.engine.errors import DamagedFile
from qwenimage_lowvram.engine.files import checkpoint as checkpoints
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.files.gguf_header import MAX_TEXTS, read_gguf_header
from qwenimage_lowvram.engine.files.header import MAX_KEPT, TENSOR_BYTES, Header, HeaderCache
from qwenimage_lowvram.engine.files.json_texts import MAX_JSON_VALUES
from qwenimage_lowvram.engine.files.model_files import MAX_FILES
from qwenimage_lowvram.engine.files.safetensors_header import MAX_TENSORS, read_safetensors_header
from safetensors.numpy import save_file

LONG_AGO = 10**18  # ns


class Counted:
    """Reads headers, and counts how often."""

    def __init__(self, read: Callable[[Path, BinaryIO], Header] = read_safetensors_header) -> None:
        self.times = 0
        self._read = read

    def __call__(self, file: Path, stream: BinaryIO) -> Header:
        self.times += 1
        return self._read(file, stream)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[Counted, Counted]:
    """Of safetensors' headers, and GGUF's, in a cache of their own."""
    readers = Counted(), Counted(read_gguf_header)
    monkeypatch.setattr(checkpoints, "_HEADERS", HeaderCache())
    monkeypatch.setattr(checkpoints, "read_safetensors_header", readers[0])
    monkeypatch.setattr(checkpoints, "read_gguf_header", readers[1])
    return readers


def write(file: Path, *names: str, value: float = 0.0, mtime_ns: int = LONG_AGO) -> Path:
    save_file({name: np.full((2, 3), value, np.float32) for name in names}, file)
    os.utime(file, ns=(mtime_ns, mtime_ns))
    return file


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def write_gguf(file: Path, *settings: tuple[bytes, bytes]) -> Path:
    """Settings as (name, type and value), no tensors."""
    pairs = b"".join(text(name) + value for name, value in settings)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(settings)) + pairs)
    os.utime(file, ns=(LONG_AGO, LONG_AGO))
    return file


NUMBER = struct.pack("<IB", 0, 7)


def test_a_header_is_read_once(counted: tuple[Counted, Counted], tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors", "a")
    write_gguf(tmp_path / "m.gguf", (b"n", NUMBER))
    for name in ("m.safetensors", "m.gguf"):
        opened = [open_checkpoint(tmp_path / name) for _ in range(3)]
        assert opened[0] == opened[1] == opened[2]
    assert [reader.times for reader in counted] == [1, 1]


def test_what_is_done_to_a_checkpoint_is_not_in_the_next_one(tmp_path: Path) -> None:
    file = write(tmp_path / "m.safetensors", "a")
    first: Any = open_checkpoint(file)
    first.tensors.clear()
    first.metadata["other"] = "x"
    again = open_checkpoint(file)
    assert set(again.tensors) == {"a"}
    assert not again.metadata


def overwrite(file: Path) -> None:
    other = file.with_suffix(".other")
    write(other, "b")
    file.write_bytes(other.read_bytes())
    os.utime(file, ns=(LONG_AGO, LONG_AGO))


def replace(file: Path) -> None:
    os.replace(write(file.with_suffix(".other"), "b"), file)


@pytest.mark.parametrize("change", [overwrite, replace])
def test_another_file_of_the_same_size_and_time_is_read_again(change: Callable[[Path], None], tmp_path: Path) -> None:
    file = write(tmp_path / "m.safetensors", "a")
    stat = file.stat()
    before = open_checkpoint(file)
    time.sleep(0.05)  # the clock of a file system ticks every 4 to 10 ms
    change(file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = open_checkpoint(file)
    assert (set(before.tensors), set(after.tensors)) == ({"a"}, {"b"})
    assert before.identity != after.identity


def test_what_was_written_just_now_is_not_kept(counted: tuple[Counted, Counted], tmp_path: Path) -> None:
    file = write(tmp_path / "m.safetensors", "a", mtime_ns=time.time_ns())
    for _ in range(2):
        open_checkpoint(file)
    assert counted[0].times == 2


def test_no_more_is_kept_than_the_bound(tmp_path: Path) -> None:
    cache, read = HeaderCache(7 * TENSOR_BYTES), Counted()
    files = [write(tmp_path / f"{i}.safetensors", "a") for i in range(4)]  # 2 tensors' bytes and the header's each
    for file in files:
        cache.get(file, read)
    assert read.times == 4
    for file in reversed(files[1:]):
        cache.get(file, read)
    assert read.times == 4
    cache.get(files[0], read)  # for which the one goes that was not asked for longest
    cache.get(files[3], read)
    assert read.times == 6
    huge = write(tmp_path / "huge.safetensors", *(f"t{i}" for i in range(8)))
    for _ in range(2):
        cache.get(huge, read)
    assert read.times == 8


def test_no_more_headers_are_kept_than_the_bound(tmp_path: Path) -> None:
    """A folder of kept prompts is read file by file."""
    cache, read = HeaderCache(), Counted()
    files = [write(tmp_path / f"{i}.safetensors", "a") for i in range(MAX_KEPT + 1)]
    for file in files:
        cache.get(file, read)
    cache.get(files[-1], read)
    assert read.times == len(files)
    cache.get(files[0], read)
    assert read.times == len(files) + 1


def test_many_threads_may_ask_at_once(tmp_path: Path) -> None:
    cache = HeaderCache(8 * TENSOR_BYTES)
    files = [write(tmp_path / f"{i}.safetensors", f"t{i}") for i in range(6)]
    wrong: list[Any] = []

    def ask() -> None:
        for turn in range(300):
            i = turn % len(files)
            found = set(cache.get(files[i], read_safetensors_header).tensors)
            if found != {f"t{i}"}:
                wrong.append(found)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_that_changes_while_its_header_is_read_is_not_kept_and_not_read_from(tmp_path: Path) -> None:
    file = write(tmp_path / "m.safetensors", "a")
    old = file.read_bytes()

    def slowly(path: Path, stream: BinaryIO) -> Header:
        header = read_safetensors_header(path, stream)
        path.write_bytes(old)
        return header

    cache, read = HeaderCache(), Counted(slowly)
    header = cache.get(file, read)
    assert header.stamp == (len(old), LONG_AGO) != (len(old), file.stat().st_mtime_ns)
    os.utime(file, ns=(LONG_AGO, LONG_AGO))
    cache.get(file, read)
    assert read.times == 2


# bounds


def test_lists_of_more_texts_than_any_vocabulary_are_refused_before_they_are_counted(tmp_path: Path) -> None:
    a_third = struct.pack("<IIQ", 9, 8, MAX_TEXTS // 3 + 1) + bytes(8 * (MAX_TEXTS // 3 + 1))
    open_checkpoint(write_gguf(tmp_path / "m.gguf", (b"a", a_third), (b"b", a_third)))
    file = write_gguf(tmp_path / "m.gguf", (b"a", a_third), (b"b", a_third), (b"c", a_third))
    with pytest.raises(DamagedFile, match=r"lists in its header claim \d+ strings"):
        open_checkpoint(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"a":[' + b",".join([b"{}"] * MAX_JSON_VALUES) + b"]}", r"its header has \d+ values"),
        (
            json.dumps(
                {f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(MAX_TENSORS + 1)}
            ).encode(),
            rf"announces {MAX_TENSORS + 1} tensors",
        ),
    ],
    ids=["values", "tensors"],
)
def test_more_than_any_model_has_is_refused(header: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DamagedFile, match=words):
        open_checkpoint(file)


def test_an_index_of_more_files_than_any_model_has_is_refused(tmp_path: Path) -> None:
    weight_map = {f"t{i}": f"{i}.safetensors" for i in range(MAX_FILES + 1)}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    with pytest.raises(DamagedFile, match=rf"names {MAX_FILES + 1} tensors in {MAX_FILES + 1} files"):
        open_checkpoint(tmp_path)


# what a header says twice, or leaves out


def test_a_gguf_setting_that_stands_twice_is_refused(tmp_path: Path) -> None:
    listed = struct.pack("<IIQ", 9, 8, 0)  # a list, which is left out of the settings
    for first, second in ((NUMBER, NUMBER), (listed, NUMBER), (NUMBER, listed)):
        file = write_gguf(tmp_path / "m.gguf", (b"some.number", first), (b"other", NUMBER), (b"some.number", second))
        with pytest.raises(DamagedFile, match=r"setting 'some\.number' appears twice"):
            open_checkpoint(file)


@pytest.mark.parametrize("behind", [b"\0", b'{"a": 1}', bytes(64)])
def test_bytes_behind_the_last_tensor_are_refused(behind: bytes, tmp_path: Path) -> None:
    file = write(tmp_path / "m.safetensors", "a")
    with file.open("ab") as stream:
        stream.write(behind)
    with pytest.raises(DamagedFile, match=rf"{len(behind)} bytes after its last tensor, which ends at"):
        open_checkpoint(file)
