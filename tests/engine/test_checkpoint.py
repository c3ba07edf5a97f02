"""A checkpoint is known from its headers alone, and what is wrong with one is said in words."""

import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import CheckpointError, DamagedFile, MissingFile
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from safetensors.torch import save_file

SHAPES = {"a.weight": (4, 6), "a.bias": (4,)}
ALIAS = Path(__file__).parents[2] / "tools" / "alias"


def _shards(folder: Path, write_model: Callable[..., Path], *, index: Any = None) -> Path:
    folder.mkdir()
    write_model(folder / "m-1.safetensors", {"a.weight": (4, 6)})
    write_model(folder / "m-2.safetensors", {"a.bias": (4,)})
    weight_map = {"a.weight": "m-1.safetensors", "a.bias": "m-2.safetensors"}
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map} if index is None else index))
    (folder / "config.json").write_text('{"kind": "test"}')
    return folder


def test_an_entry_leads_to_the_tensors_bytes(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(6.0).view(2, 3), "y": torch.arange(4, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"config": '{"kind": "test"}'})
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    for name, tensor in tensors.items():
        entry = checkpoint.tensors[name]
        raw = entry.file.read_bytes()[entry.offset : entry.offset + entry.nbytes]
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=tensor.dtype).view(entry.shape), tensor)
    assert checkpoint.nbytes == 6 * 4 + 4 * 2
    assert checkpoint.config == {"kind": "test"}


def test_shards_and_a_single_file_hold_the_same_tensors(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    sharded = open_checkpoint(_shards(tmp_path / "sharded", write_model))
    single = open_checkpoint(write_model(tmp_path / "m.safetensors", SHAPES))
    (tmp_path / "folder").mkdir()
    write_model(tmp_path / "folder" / "model.safetensors", SHAPES)
    folder = open_checkpoint(tmp_path / "folder")
    for checkpoint in (sharded, folder):
        assert {n: e.shape for n, e in checkpoint.tensors.items()} == {n: e.shape for n, e in single.tensors.items()}
    assert sharded.config == {"kind": "test"}
    assert folder.config is None


@pytest.mark.parametrize("name", ["config.json", "m.safetensors.index.json", "m-1.safetensors", "m-2.safetensors"])
def test_a_checkpoint_knows_whether_each_of_its_files_is_as_it_was(
    name: str, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    folder = _shards(tmp_path / "sharded", write_model)
    checkpoint = open_checkpoint(folder)
    checkpoint.require_unchanged()
    os.utime(folder / name, ns=(10**18, 10**18))
    with pytest.raises(DamagedFile, match=rf"(?s){name} was changed after it was opened .*What to do: queue"):
        checkpoint.require_unchanged()
    (folder / name).unlink()
    with pytest.raises(MissingFile, match=rf"{name} can no longer be read"):
        checkpoint.require_unchanged()


def test_identity_stays_where_nothing_changed(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    file = write_model(tmp_path / "m.safetensors", SHAPES)
    assert open_checkpoint(file).identity == open_checkpoint(file).identity


@pytest.mark.parametrize("change", ["header", "mtime", "metadata"])
def test_identity_changes_with_header_and_time(change: str, tmp_path: Path, write_model: Callable[..., Path]) -> None:
    file = write_model(tmp_path / "m.safetensors", SHAPES)
    os.utime(file, ns=(10**18, 10**18))
    before = open_checkpoint(file).identity
    if change == "header":
        write_model(file, {"b.weight": (4, 6), "a.bias": (4,)})
    elif change == "metadata":
        write_model(file, SHAPES, metadata={"trained": "longer"})
    os.utime(file, ns=(10**18 + (change == "mtime"),) * 2)
    assert open_checkpoint(file).identity != before


def test_opening_forty_gigabytes_reads_the_header_only(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    shapes = {f"transformer_blocks.{i}.w": (10_000, 33_333) for i in range(60)}
    file = write_model(tmp_path / "m.safetensors", shapes)
    assert file.stat().st_size > 39e9
    before = _bytes_read()
    tracemalloc.start()
    try:
        assert open_checkpoint(file).nbytes > 39e9
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert _bytes_read() - before < 100_000


def _bytes_read() -> int:
    """What this process has read so far, where the system tells it."""
    counters = Path("/proc/self/io")
    return int(counters.read_text().split()[1]) if counters.exists() else 0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"nowhere\.safetensors does not exist\. Check the name"):
        open_checkpoint(tmp_path / "nowhere.safetensors")


def test_a_missing_shard_is_named(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    folder = _shards(tmp_path / "sharded", write_model)
    (folder / "m-2.safetensors").unlink()
    with pytest.raises(MissingFile, match=r"names 2 files, of which 1 cannot be found \(m-2\.safetensors\)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("count", [0, 2])
def test_a_folder_without_index_has_one_file(count: int, tmp_path: Path, write_model: Callable[..., Path]) -> None:
    for i in range(count):
        write_model(tmp_path / f"{i}.safetensors", SHAPES)
    with pytest.raises(MissingFile, match=rf"holds {count} \.safetensors files and no index"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index",
    [[], {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": ["x"], "b": None}}],
)
def test_a_damaged_index_is_a_checkpoint_error(index: Any, tmp_path: Path, write_model: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"m\.safetensors\.index\.json"):
        open_checkpoint(_shards(tmp_path / "sharded", write_model, index=index))


def test_a_tensor_may_not_stand_in_two_shards(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    folder = _shards(tmp_path / "sharded", write_model)
    write_model(folder / "m-2.safetensors", SHAPES)
    with pytest.raises(DamagedFile, match=r"'a\.weight' is in two files, m-1\.safetensors and m-2\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\xff"])
def test_a_damaged_configuration_is_named(text: str, tmp_path: Path, write_model: Callable[..., Path]) -> None:
    write_model(tmp_path / "m.safetensors", SHAPES)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 8, 20])
def test_a_file_cut_in_its_header_is_damaged(kept: int, tmp_path: Path, write_model: Callable[..., Path]) -> None:
    file = write_model(tmp_path / "m.safetensors", SHAPES)
    os.truncate(file, kept)
    with pytest.raises(DamagedFile, match=rf"is cut off: it has {kept} bytes.*Download it again"):
        open_checkpoint(file)


def test_a_file_cut_in_its_data_is_damaged(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    file = write_model(tmp_path / "m.safetensors", SHAPES)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(
        DamagedFile, match=r"m\.safetensors is cut off: 'a\.bias' ends at byte \d+, but the file has \d+"
    ):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"GGUF\x03\0\0\0" + bytes(100), r"a GGUF file\. Rename it so that it ends in \.gguf"),
        (b"PK\x03\x04" + bytes(100), r"a zip archive, like PyTorch's \.pt files"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9", "a pickle file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "only a git-lfs pointer"),
        (b"<!DOCTYPE html><html>" * 9, r"a web page\. Download the file itself"),
    ],
)
def test_another_kind_of_file_is_named(contents: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(contents)
    with pytest.raises(DamagedFile, match=rf"m\.safetensors is not a safetensors file, but {words}"):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/m.safetensors", "a/m.safetensors", "..\\m.safetensors", "C:m.safetensors",
     "C:\\m.safetensors", "\\\\host\\share\\m.safetensors", "m\0.safetensors", "..", "", "config.json"],
)  # fmt: skip
def test_an_index_leads_to_no_file_outside_its_folder(
    name: str, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    write_model(tmp_path / "secret.safetensors", SHAPES)
    folder = _shards(tmp_path / "sharded", write_model, index={"weight_map": {"a.weight": name}})
    with pytest.raises(DamagedFile, match=r"which is not a \.safetensors file in the same folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("size", [17_000_000, 5_000_000_000])
def test_a_configuration_of_gigabytes_is_refused_unread(
    size: int, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    write_model(tmp_path / "m.safetensors", SHAPES)
    (tmp_path / "config.json").write_text("{")
    os.truncate(tmp_path / "config.json", size)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFile, match=r"config\.json has 16000001 bytes"):
            open_checkpoint(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1])
def test_an_absurd_header_is_refused_before_it_is_allocated(
    length: int, tmp_path: Path, write_header: Callable[..., Path]
) -> None:
    file = write_header(tmp_path / "m.safetensors", {}, 2**30, announce=length)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFile, match=f"announce a header of {length}"):
            open_checkpoint(file)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
UNPRINTABLE = b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, ' + b"9" * 4300 + b"]}}"
DAMAGED = {
    "not JSON": b"{" * 50,
    "not UTF-8": b"\xff\xfe{}" * 3,
    "deeply nested": b"[" * 100_000,
    "nested as deeply as Python can read, and not print": b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a shape of too many numbers": {"x": {**ENTRY, "shape": [1] * 9}},
    "a name without end": {"x" * 300: ENTRY},
    "a dtype that is no name": {"x": {**ENTRY, "dtype": "\ud800"}},
    "a dtype that is a list": {"x": {**ENTRY, "dtype": [1]}},
    "a list": [ENTRY],
    "an entry that is a list": {"x": [1, 2, 3]},
    "an entry that is null": {"x": None},
    "no offsets": {"x": {"dtype": "F32", "shape": [2]}},
    "three offsets": {"x": {**ENTRY, "data_offsets": [0, 4, 8]}},
    "offsets the wrong way round": {"x": {**ENTRY, "data_offsets": [8, 0]}},
    "the same of an unknown dtype": {"x": {"dtype": "F4", "shape": [2], "data_offsets": [8, 0]}},
    "negative shape": {"x": {**ENTRY, "shape": [-2]}},
    "fractional shape": {"x": {**ENTRY, "shape": [2.0]}},
    "shape that is a number": {"x": {**ENTRY, "shape": 2}},
    "shape that does not fit its bytes": {"x": {**ENTRY, "shape": [3]}},
    "a number that Python will not print": UNPRINTABLE,
    "metadata that is a list": {"__metadata__": [1], "x": ENTRY},
    "metadata that is a number": {"__metadata__": 3, "x": ENTRY},
    "configuration that is a number": {"__metadata__": {"config": 3}, "x": ENTRY},
    "configuration that is not JSON": {"__metadata__": {"config": "{"}, "x": ENTRY},
}


@pytest.mark.parametrize("header", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_header_is_a_damaged_file(header: Any, tmp_path: Path, write_header: Callable[..., Path]) -> None:
    file = write_header(tmp_path / "m.safetensors", header, 64)
    with pytest.raises(DamagedFile, match=r"m\.safetensors"):
        open_checkpoint(file)


_AS_NOBODY = """
import os, sys
from pathlib import Path
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.errors import MissingFile
if os.getuid() == 0:
    try:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
    except PermissionError:
        sys.exit(77)
try:
    open_checkpoint(Path(sys.argv[1]))
except MissingFile as error:
    print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX's")
@pytest.mark.parametrize(
    ("locked", "mode", "opened"),
    [
        ("folder", 0o000, "folder"),
        ("folder", 0o111, "folder"),
        ("folder", 0o444, "folder"),
        ("folder", 0o000, "folder/model.safetensors"),
        ("folder/model.safetensors", 0o000, "folder"),
        ("folder/model.safetensors", 0o000, "folder/model.safetensors"),
        ("folder/config.json", 0o000, "folder"),
    ],
)
def test_without_permission_the_message_says_so(
    locked: str, mode: int, opened: str, write_model: Callable[..., Path]
) -> None:
    # pytest's own temporary folders are closed to other users from the top
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        root.chmod(0o755)
        (root / "folder").mkdir(mode=0o755)
        write_model(root / "folder" / "model.safetensors", SHAPES)
        (root / "folder" / "config.json").write_text("{}")
        (root / locked).chmod(mode)
        try:
            done = subprocess.run(
                [sys.executable, "-c", _AS_NOBODY, str(root / opened)],
                env={**os.environ, "PYTHONPATH": str(ALIAS)},
                capture_output=True,
                text=True,
            )
        finally:
            (root / locked).chmod(0o755)
    if done.returncode == 77:
        pytest.skip("this root may not become another user")
    assert "cannot be read" in done.stdout, done.stderr
    assert "Check that your user account may read it." in done.stdout
