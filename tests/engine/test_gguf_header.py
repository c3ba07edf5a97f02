"""A GGUF file is known from its header alone, and what is wrong with one is said in words."""

import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from qwenimage_lowvram.engine.errors import DamagedFile, MissingFile, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.models.qwen25_vl.tensors import sort_text_encoder
from qwenimage_lowvram.engine.models.qwen_image.tensors import sort_transformer
from safetensors.torch import save_file


def write_gguf(file: Path, architecture: str = "qwen_image", **tensors: np.ndarray) -> Path:
    writer = GGUFWriter(file, architecture)
    writer.add_uint32("some.number", 7)
    writer.add_string("some.text", "text")
    writer.add_bool("some.truth", True)
    writer.add_array("some.list", [1, 2, 3])
    writer.add_token_list([f"token {i}" for i in range(1000)])
    writer.add_array("a.long.list", list(range(1000)))
    for name, values in tensors.items():
        quantized = values.dtype == np.uint8
        writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType.Q8_0 if quantized else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def two_tensors(tmp_path: Path) -> Path:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    return write_gguf(tmp_path / "m.gguf", a=values, b=np.arange(10 * 34, dtype=np.uint8).reshape(5, -1))


def test_an_entry_leads_to_the_tensors_bytes(two_tensors: Path) -> None:
    checkpoint = open_checkpoint(two_tensors)
    entries = checkpoint.tensors
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
        "a": ("F32", (3, 4)),
        "b": ("Q8_0", (5, 64)),
    }
    for tensor in gguf.GGUFReader(two_tensors).tensors:
        entry = entries[tensor.name]
        assert two_tensors.read_bytes()[entry.offset : entry.offset + entry.nbytes] == tensor.data.tobytes()
    assert checkpoint.nbytes == 12 * 4 + 10 * 34


def test_settings_are_metadata_and_vocabularies_are_stepped_over(two_tensors: Path) -> None:
    metadata = open_checkpoint(two_tensors).metadata
    assert metadata["general.architecture"] == "qwen_image"
    assert (metadata["some.text"], metadata["some.number"], metadata["some.truth"]) == ("text", "7", "true")
    assert metadata["some.list"] == "[1, 2, 3]"
    assert "tokenizer.ggml.tokens" not in metadata
    assert "a.long.list" not in metadata


def test_identity_changes_with_the_header_and_the_file(tmp_path: Path) -> None:
    values = np.zeros((2, 32), dtype=np.float32)
    first = open_checkpoint(write_gguf(tmp_path / "m.gguf", a=values)).identity
    assert open_checkpoint(tmp_path / "m.gguf").identity == first
    os.truncate(tmp_path / "m.gguf", (tmp_path / "m.gguf").stat().st_size + 32)
    assert open_checkpoint(tmp_path / "m.gguf").identity != first
    assert open_checkpoint(write_gguf(tmp_path / "m.gguf", b=values)).identity != first


def test_opening_twenty_gigabytes_reads_the_header_only(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", a=np.zeros((1, 32), dtype=np.float32))
    raw = bytearray(file.read_bytes())
    name = raw.rindex(struct.pack("<Q", 1) + b"a")
    raw[name + 9 : name + 9 + 20] = struct.pack("<IQQ", 2, 65536, 76294)  # two dimensions, the fastest first
    file.write_bytes(raw)
    with file.open("r+b") as stream:
        stream.truncate(len(raw) + 4 * 65536 * 76294)
    tracemalloc.start()
    try:
        assert open_checkpoint(file).tensors["a"].nbytes == 4 * 65536 * 76294
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_another_file_under_the_name_is_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(DamagedFile, match="is not a GGUF file: it begins with b'PK"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_safetensors_file_with_the_ending_of_a_gguf_file_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "m.gguf")
    with pytest.raises(DamagedFile, match=r"m\.gguf is not a GGUF file, but a safetensors file\. Rename it"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"nowhere\.gguf does not exist"):
        open_checkpoint(tmp_path / "nowhere.gguf")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.3, 0.9, 0.99])
def test_a_file_cut_off_anywhere_is_damaged(share: float, two_tensors: Path) -> None:
    raw = two_tensors.read_bytes()
    two_tensors.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(DamagedFile, match=r"cut off|not a GGUF file"):
        open_checkpoint(two_tensors)


DAMAGES: dict[str, tuple[int, bytes, str]] = {
    "version": (4, struct.pack("<I", 9), "version 9"),
    "as many tensors as there can be": (8, struct.pack("<Q", 2**63), f"claims {2**63} tensors"),
    "as many settings as there can be": (16, struct.pack("<Q", 2**63), f"and {2**63} settings"),
    "more tensors than there are": (8, struct.pack("<Q", 40_000), "cut off|dimensions|a name in its header"),
    "a name of all memory": (24, struct.pack("<Q", 2**62), f"a name in its header has {2**62} bytes"),
    "a text of all memory": (24 + 8 + 20 + 4, struct.pack("<Q", 2**62), "cut off"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_an_absurd_number_is_refused_before_it_is_allocated(damage: tuple[int, bytes, str], two_tensors: Path) -> None:
    at, value, words = damage
    raw = bytearray(two_tensors.read_bytes())
    raw[at : at + len(value)] = value
    two_tensors.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFile, match=words):
            open_checkpoint(two_tensors)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_an_unknown_type_is_named(two_tensors: Path) -> None:
    raw = bytearray(two_tensors.read_bytes())
    at = raw.rindex(struct.pack("<Q", 1) + b"b") + 9 + 4 + 16
    raw[at : at + 4] = struct.pack("<I", 999)
    two_tensors.write_bytes(raw)
    with pytest.raises(DamagedFile, match=r"'b' has the unknown ggml type 999\. Update the gguf package"):
        open_checkpoint(two_tensors)


def test_rows_are_whole_blocks(two_tensors: Path) -> None:
    raw = bytearray(two_tensors.read_bytes())
    at = raw.rindex(struct.pack("<Q", 1) + b"b") + 9 + 4
    raw[at : at + 8] = struct.pack("<Q", 33)
    two_tensors.write_bytes(raw)
    with pytest.raises(DamagedFile, match=r"'b' Q8_0\[5, 33\]"):
        open_checkpoint(two_tensors)


@pytest.mark.parametrize(
    ("architecture", "names", "words"),
    [
        ("flux", ["double_blocks.0.img_attn.qkv.weight"], r"is a Flux transformer \(GGUF architecture 'flux', 1 tens"),
        ("clip", ["v.blk.0.attn_q.weight"], r"is the vision part \(mmproj\) of a text encoder"),
        ("t5encoder", ["enc.blk.0.attn_q.weight"], "is the text encoder of another model"),
        ("llama", ["blk.0.attn_q.weight"], "is the text encoder of another model"),
        ("something", ["weights"], r"is a model that is not recognised \(GGUF architecture 'something'"),
    ],
)
def test_another_model_in_the_transformers_place_is_named(
    architecture: str, names: list[str], words: str, tmp_path: Path
) -> None:
    values = np.zeros((32, 32), dtype=np.float32)
    file = write_gguf(tmp_path / "m.gguf", architecture, **dict.fromkeys(names, values))
    with pytest.raises(WrongModel, match=words):
        sort_transformer(open_checkpoint(file))


NAMES_OF_A_TEXT_ENCODER = {
    "transformers'": (
        "model.embed_tokens",
        "model.norm",
        "model.layers.0.self_attn.{}_proj",
        "model.layers.0.mlp.gate_proj",
    ),
    "llama.cpp's": ("token_embd", "output_norm", "blk.0.attn_{}", "blk.0.ffn_gate"),
}


@pytest.mark.parametrize("names", NAMES_OF_A_TEXT_ENCODER.values(), ids=NAMES_OF_A_TEXT_ENCODER)
@pytest.mark.parametrize("biases", [True, False])
def test_a_text_encoder_of_an_architecture_for_any_model_is_known_by_its_tensors(
    names: tuple[str, ...], biases: bool, tmp_path: Path
) -> None:
    embeddings, norm, attention, gate = names
    tensors = {
        f"{embeddings}.weight": np.zeros((8, 256), np.float32),
        f"{norm}.weight": np.zeros(256, np.float32),
        f"{attention.format('q')}.weight": np.zeros((256, 256), np.float32),
        f"{attention.format('k')}.weight": np.zeros((128, 256), np.float32),
        f"{gate}.weight": np.zeros((512, 256), np.float32),
    } | ({f"{attention.format('q')}.bias": np.zeros(256, np.float32)} if biases else {})
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", "pig", **tensors))
    if not biases:
        with pytest.raises(WrongModel, match=r"is the text encoder of another model \(GGUF architecture 'pig'"):
            sort_text_encoder(checkpoint)
        return
    found = sort_text_encoder(checkpoint)
    assert (len(found.layers), found.config["num_attention_heads"], found.config["num_key_value_heads"]) == (1, 2, 1)
