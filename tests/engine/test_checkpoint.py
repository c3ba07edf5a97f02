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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qwenimage_lowvram.engine.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.errors import CheckpointError, DamagedFile, MissingFile, QwenLowVRAMError
from qwenimage_lowvram.engine.families import identify, sort_text_encoder, sort_transformer
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


def test_identity_stays_where_nothing_changed(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    file = write_model(tmp_path / "m.safetensors", SHAPES)
    assert open_checkpoint(file).identity == open_checkpoint(file).identity


@pytest.mark.parametrize("change", ["header", "size", "mtime", "metadata"])
def test_identity_changes_with_header_size_and_time(
    change: str, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    file = write_model(tmp_path / "m.safetensors", SHAPES)
    os.utime(file, ns=(10**18, 10**18))
    before = open_checkpoint(file).identity
    if change == "header":
        write_model(file, {"b.weight": (4, 6), "a.bias": (4,)})
    elif change == "metadata":
        write_model(file, SHAPES, metadata={"trained": "longer"})
    elif change == "size":
        os.truncate(file, file.stat().st_size + 1)
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
    with pytest.raises(MissingFile, match=r"names 2 files, 1 of them are not there \(m-2\.safetensors\)"):
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
    with pytest.raises(DamagedFile, match=r"'a\.weight' stands in two files, m-1\.safetensors and m-2\.safetensors"):
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
    with pytest.raises(DamagedFile, match=r"m\.safetensors is cut off: 'a\.bias' ends at byte \d+, the file has \d+"):
        open_checkpoint(file)


@pytest.mark.parametrize("contents", [b"PK\x03\x04" + bytes(100), b"<!DOCTYPE html><html>" * 9])
def test_another_kind_of_file_is_not_safetensors(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(contents)
    with pytest.raises(DamagedFile, match="is not a safetensors file"):
        open_checkpoint(tmp_path / "m.safetensors")


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


# what a header could say: near enough to a real one that every check is reached
_numbers = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**63, 2**64, 1.5, None, "4", True]))
_names = st.sampled_from(
    [
        "transformer_blocks.0.attn.add_q_proj.weight", "transformer_blocks.0.img_mod.1.weight",
        "transformer_blocks.0.attn.norm_q.weight", "transformer_blocks.x.y", "transformer_blocks.0",
        "transformer_blocks.7.attn.to_q.weight", "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight",
        "model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.gate_proj.weight", "model.norm.weight",
        "img_in.weight", "txt_in.weight", "proj_out.weight", "__metadata__", "", "layers.", "decoder.conv_in.weight",
    ]
)  # fmt: skip
_json = st.recursive(st.one_of(st.none(), st.booleans(), _numbers, st.text(max_size=8)), st.lists, max_leaves=6)
_entries = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", 3]),
            "shape": st.lists(_numbers, max_size=3),
            "data_offsets": st.lists(_numbers, min_size=1, max_size=3),
        }
    ),
    st.integers(0, 9).map(lambda n: {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}),
    st.integers(0, 6).map(lambda n: {"dtype": "U8", "shape": [n, n], "data_offsets": [0, n * n]}),
    st.just({"dtype": "U8", "shape": [], "data_offsets": [0, 1]}),
    _json,
)
_config = st.dictionaries(
    st.sampled_from(["axes_dims_rope", "text_config", "num_attention_heads", "rope_scaling", "zero_cond_t"]), _json
)
_headers = st.tuples(st.dictionaries(_names, _entries, max_size=8), st.none() | _config).map(
    lambda pair: {**pair[0], "__metadata__": {"config": json.dumps(pair[1])}} if pair[1] is not None else pair[0]
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.one_of(_headers, st.binary(max_size=60)), announce=st.none() | st.integers(0, 2**64 - 1))
def test_no_header_brings_another_error_than_ours(
    header: Any, announce: int | None, tmp_path: Path, write_header: Callable[..., Path]
) -> None:
    file = write_header(tmp_path / "m.safetensors", header, 40, announce=announce)
    try:
        checkpoint = open_checkpoint(file)
    except CheckpointError:
        return
    identify(checkpoint.tensors)
    for sort in (sort_transformer, sort_text_encoder):
        try:
            sort(checkpoint)
        except QwenLowVRAMError as error:
            assert str(error)  # noqa: PT017


TEXT_SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (256, 256),
    "model.layers.0.self_attn.q_proj.bias": (256,),
    "model.layers.0.self_attn.k_proj.weight": (128, 256),
    "model.layers.0.mlp.gate_proj.weight": (512, 256),
    "model.embed_tokens.weight": (300, 256),
    "model.norm.weight": (256,),
}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), text=st.booleans(), config=st.none() | _config)
def test_a_model_with_one_tensor_changed_brings_no_other_error_than_ours(
    data: st.DataObject,
    text: bool,
    config: Any,
    tmp_path: Path,
    transformer_shapes: dict[str, tuple[int, ...]],
    write_model: Callable[..., Path],
) -> None:
    shapes = dict(TEXT_SHAPES if text else transformer_shapes)
    name = data.draw(st.sampled_from(sorted(shapes)))
    shape = data.draw(st.none() | st.lists(st.integers(0, 300), max_size=3).map(tuple))
    del shapes[name]
    if shape is not None:
        shapes[data.draw(st.just(name) | _names.filter(lambda n: n != "__metadata__"))] = shape
    metadata = None if config is None else {"config": json.dumps(config)}
    try:
        checkpoint = open_checkpoint(write_model(tmp_path / "m.safetensors", shapes, metadata=metadata))
        (sort_text_encoder if text else sort_transformer)(checkpoint)
    except QwenLowVRAMError as error:
        assert str(error)  # noqa: PT017


_AS_NOBODY = """
import os, sys
from pathlib import Path
from qwenimage_lowvram.engine.checkpoint import open_checkpoint
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
    assert "Check that this user may read it." in done.stdout
