"""A text encoder's vision part is found, sorted and read alike from every kind of file that holds it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from gguf_files import write_gguf_text_encoder, write_gguf_vision
from hypothesis import given, settings
from hypothesis import strategies as st
from qwenimage_lowvram.engine.errors import MissingFile, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import TensorEntry, open_checkpoint
from qwenimage_lowvram.engine.models.qwen25_vl.component import TEXT_ENCODER
from qwenimage_lowvram.engine.models.qwen25_vl.vision_tensors import sort_vision
from qwenimage_lowvram.engine.models.qwen_vl.vision_files import VisionTensors, find_mmproj
from qwenimage_lowvram.engine.models.recognition import require
from qwenimage_lowvram.engine.streaming import TensorReader, read_params
from safetensors.torch import load_file, save_file
from small_checkpoint import TextSize, make_text_encoder, make_tokenizer

ENCODER = "Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf"
MMPROJ = "Qwen2.5-VL-7B-Instruct-mmproj-F16.gguf"


@dataclass(frozen=True)
class Encoder:
    """A small text encoder: transformers' model, the tensors and the configuration that its folder holds."""

    model: Any
    weights: dict[str, torch.Tensor]
    config: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, comfyui_path: Path) -> Encoder:
    model = make_text_encoder(make_tokenizer(full=False, comfyui=comfyui_path), TextSize(), seed=2)
    folder = tmp_path_factory.mktemp("vision") / "text_encoder"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Encoder(model, load_file(folder / "model.safetensors"), config, folder)


@pytest.fixture(scope="module")
def gguf_folder(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf_text_encoder(folder / ENCODER, encoder.weights, encoder.config, "Q8_0")
    write_gguf_vision(folder / MMPROJ, encoder.weights, encoder.config, "F32")
    return folder


@pytest.fixture
def copied(gguf_folder: Path, tmp_path: Path) -> Path:
    """The folder of the GGUF encoder, free to be changed."""
    return Path(shutil.copytree(gguf_folder, tmp_path / "copied"))


def read(vision: VisionTensors) -> dict[str, torch.Tensor]:
    """Everything of a vision part, in fp32, under transformers' names."""
    where = str(vision.checkpoint.path)
    sets = [("", vision.outside), *((f"blocks.{i}.", block) for i, block in enumerate(vision.blocks))]
    return {
        prefix + name: value
        for prefix, tensors in sets
        for name, value in read_params(
            tensors, {name: entry.shape for name, entry in tensors.items()}, torch.float32, where
        ).items()
    }


def assert_equal(vision: VisionTensors, encoder: Encoder) -> None:
    found, wanted = read(vision), encoder.model.model.visual.state_dict()
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_a_folders_vision_part_is_transformers_own(encoder: Encoder) -> None:
    assert_equal(sort_vision(open_checkpoint(encoder.folder)), encoder)


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
def test_a_single_files_vision_part_is_sorted_under_every_prefix(prefix: str, encoder: Encoder, tmp_path: Path) -> None:
    renamed = {name.replace("visual.", prefix, 1): value for name, value in encoder.weights.items()}
    save_file(renamed, tmp_path / "m.safetensors", metadata={"config": json.dumps(encoder.config)})
    assert_equal(sort_vision(open_checkpoint(tmp_path / "m.safetensors")), encoder)


def test_an_mmproj_in_fp32_is_the_original_bit_for_bit(gguf_folder: Path, encoder: Encoder) -> None:
    vision = sort_vision(open_checkpoint(gguf_folder / ENCODER))
    assert vision.checkpoint.path.name == MMPROJ
    assert_equal(vision, encoder)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_an_mmproj_of_any_type_is_what_its_tensors_decode_to(kind: str, copied: Path, encoder: Encoder) -> None:
    write_gguf_vision(copied / MMPROJ, encoder.weights, encoder.config, kind)
    found = read(sort_vision(open_checkpoint(copied / ENCODER)))
    for name, value in encoder.model.model.visual.state_dict().items():
        stored = "F32" if value.ndim == 1 else "F16" if value.ndim == 5 else kind
        pieces = value.chunk(3) if ".qkv." in name else [value]
        type_ = GGMLQuantizationType[stored]
        decoded = [quants.dequantize(quants.quantize(p.contiguous().numpy(), type_), type_) for p in pieces]
        assert torch.equal(found[name], torch.from_numpy(np.concatenate(decoded)).view(value.shape)), name


@pytest.mark.parametrize("source", ["folder", "mmproj"])
def test_the_configuration_builds_transformers_tower(source: str, encoder: Encoder, gguf_folder: Path) -> None:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    config = sort_vision(open_checkpoint(encoder.folder if source == "folder" else gguf_folder / ENCODER)).config
    made, wanted = Qwen2_5_VLVisionConfig(**config), encoder.model.config.vision_config
    assert {key: getattr(made, key) for key in config} == {key: getattr(wanted, key) for key in config}


def test_full_size_settings_need_no_configuration(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    text = {
        "model.layers.0.self_attn.q_proj.weight": (3584, 3584),
        "model.layers.0.self_attn.q_proj.bias": (3584,),
        "model.layers.0.self_attn.k_proj.weight": (512, 3584),
        "model.layers.0.mlp.gate_proj.weight": (18944, 3584),
        "model.embed_tokens.weight": (100, 3584),
        "model.norm.weight": (3584,),
    }
    vision = {
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        "visual.merger.mlp.2.weight": (3584, 5120),
        **{f"visual.blocks.{i}.mlp.gate_proj.weight": (3420, 1280) for i in range(32)},
    }
    config = sort_vision(open_checkpoint(write_model(tmp_path / "m.safetensors", text | vision))).config
    # https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct, config.json
    assert config == {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_channels": 3,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), pieces=st.integers(1, 3), run=st.integers(1, 7), turns=st.integers(1, 5))
def test_any_stretch_of_a_tensor_in_pieces_is_read(
    data: st.DataObject, pieces: int, run: int, turns: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = np.arange(pieces * turns * run, dtype=np.uint8).reshape(turns, pieces, run)
    file = tmp_path_factory.mktemp("pieces") / "bytes"
    size = turns * run
    file.write_bytes(b"".join(b"xyz" + raw[:, i].tobytes() for i in range(pieces)))
    parts = tuple(TensorEntry(file, i * (size + 3) + 3, size, "U8", (size,)) for i in range(pieces))
    whole = TensorEntry(file, 3, raw.size, "U8", (raw.size,), parts=parts, run_bytes=run)
    begin = data.draw(st.integers(0, raw.size))
    out = bytearray(data.draw(st.integers(0, raw.size - begin)))
    reader = TensorReader()
    reader.read_into(whole, memoryview(out), skip=begin)
    reader.close()
    assert bytes(out) == raw.tobytes()[begin : begin + len(out)]


# which file it is


@pytest.mark.parametrize(
    ("encoder_name", "others", "expected"),
    [
        (ENCODER, [MMPROJ], MMPROJ),
        ("Qwen2.5-VL-7B-Instruct-UD-Q4_K_XL.gguf", ["mmproj-BF16.gguf"], "mmproj-BF16.gguf"),
        ("qwen2.5-vl-7b-instruct.iq4_nl.gguf", ["mmproj-Qwen2.5-VL-7B-Instruct-f16.gguf"], None),
        (ENCODER, ["Qwen2.5-VL-7B-Instruct-mmproj-f16.gguf", "mmproj-F16.gguf", "X-mmproj-F16.gguf"], None),
        (ENCODER, ["mmproj-F16.gguf", "Qwen3-VL-8B-mmproj-F16.gguf"], "mmproj-F16.gguf"),
        ("my_encoder_q8_0.gguf", [MMPROJ], MMPROJ),
        ("Qwen2.5-VL-7B-Instruct.Q6_K.GGUF", ["Qwen2.5-VL-7B-Instruct.mmproj-Q8_0.GGUF"], None),
    ],
)
def test_the_vision_part_is_found_by_its_name(
    encoder_name: str, others: list[str], expected: str | None, tmp_path: Path
) -> None:
    for name in [*others, encoder_name, "readme-mmproj.txt", "flux1-dev-Q4_K.gguf"]:
        (tmp_path / name).touch()
    assert find_mmproj(tmp_path / encoder_name, "").name == (expected or others[0])


def test_a_gguf_encoder_without_mmproj_says_which_file_belongs_there(copied: Path) -> None:
    (copied / MMPROJ).unlink()
    with pytest.raises(MissingFile, match=rf"Put the mmproj file of the same model.* into {copied}, or use a \.safet"):
        sort_vision(open_checkpoint(copied / ENCODER))


def test_several_vision_parts_are_named(copied: Path) -> None:
    shutil.copy(copied / MMPROJ, copied / MMPROJ.replace("F16", "BF16"))
    with pytest.raises(
        MissingFile, match=r"2 files beside it .*mmproj-BF16\.gguf, .*mmproj-F16\.gguf\)\. Keep only one"
    ):
        sort_vision(open_checkpoint(copied / ENCODER))


def test_the_vision_part_of_another_family_is_refused(copied: Path, encoder: Encoder) -> None:
    write_gguf_vision(copied / MMPROJ, encoder.weights, encoder.config, "F32", projector="qwen3vl_merger")
    with pytest.raises(WrongModel, match=r"projector 'qwen3vl_merger'\); the vision part of Qwen2\.5-VL .*is needed"):
        sort_vision(open_checkpoint(copied / ENCODER))


def test_a_language_model_under_the_name_of_a_vision_part_is_refused(copied: Path) -> None:
    shutil.copy(copied / ENCODER, copied / MMPROJ)
    with pytest.raises(WrongModel, match=r"mmproj-F16\.gguf is a Qwen2\.5-VL text encoder \(architecture 'qwen2vl'"):
        sort_vision(open_checkpoint(copied / ENCODER))


def test_the_vision_part_of_another_size_is_refused(copied: Path, encoder: Encoder, comfyui_path: Path) -> None:
    size = TextSize(hidden=128)
    other = make_text_encoder(make_tokenizer(full=False, comfyui=comfyui_path), size, seed=2)
    weights = {f"visual.{name}": value for name, value in other.model.visual.state_dict().items()}
    write_gguf_vision(copied / MMPROJ, weights, encoder.config, "F32")
    with pytest.raises(WrongModel, match=r"makes 128 numbers .*takes 64: they are models of different sizes"):
        sort_vision(open_checkpoint(copied / ENCODER))


def test_pieces_of_different_types_are_refused(copied: Path) -> None:
    writer = GGUFWriter(copied / MMPROJ, "clip")
    values = np.zeros((32, 32), dtype=np.float32)
    for letter, dtype in zip("qkv", (np.float32, np.float16, np.float32), strict=True):
        writer.add_tensor(f"v.blk.0.attn_{letter}.weight", values.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WrongModel, match=r"'v\.blk\.0\.attn_k\.weight' is F16\[32, 32\] .*they form one tensor"):
        sort_vision(open_checkpoint(copied / ENCODER))


def test_an_encoder_stripped_of_its_vision_part_is_named(encoder: Encoder, tmp_path: Path) -> None:
    text = {name: value for name, value in encoder.weights.items() if not name.startswith("visual.")}
    save_file(text, tmp_path / "m.safetensors", metadata={"config": json.dumps(encoder.config)})
    with pytest.raises(WrongModel, match="holds a language model without its vision part"):
        sort_vision(open_checkpoint(tmp_path / "m.safetensors"))


def test_an_mmproj_in_the_encoders_place_says_that_it_is_found_by_itself(copied: Path) -> None:
    with pytest.raises(WrongModel, match=r"is the vision part \(mmproj\).* found automatically beside the text"):
        require(open_checkpoint(copied / MMPROJ), TEXT_ENCODER)
