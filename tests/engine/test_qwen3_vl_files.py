"""A Qwen3-VL encoder is told from every other text encoder, and each wrong one is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from full_size_qwen3_vl import text_encoder_checkpoint
from gguf_files import write_gguf_text_encoder, write_gguf_vision
from qwenimage_lowvram.engine.errors import MissingFile, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.models import foreign
from qwenimage_lowvram.engine.models.qwen3_vl import component
from qwenimage_lowvram.engine.models.qwen3_vl.tensors import require_fitting_encoder, sort_text_encoder
from qwenimage_lowvram.engine.models.qwen3_vl.vision_tensors import sort_vision
from qwenimage_lowvram.engine.models.qwen25_vl.component import TEXT_ENCODER as QWEN25_VL
from qwenimage_lowvram.engine.models.qwen25_vl.tensors import sort_text_encoder as sort_qwen25_vl
from qwenimage_lowvram.engine.models.qwen25_vl.vision_tensors import sort_vision as sort_qwen25_vision
from qwenimage_lowvram.engine.models.qwen_vl.vision_files import mmproj_identity
from qwenimage_lowvram.engine.models.recognition import identify
from safetensors.torch import load_file, save_file
from small_checkpoint import TextSize, make_text_encoder, make_tokenizer
from small_qwen3_vl import make_qwen3_vl, write_gguf_encoder, write_gguf_mmproj

QWEN3_VL = component.TEXT_ENCODER


@pytest.fixture(scope="module")
def tokenizer(comfyui_path: Path) -> Any:
    return make_tokenizer(full=False, comfyui=comfyui_path)


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_vl")
    make_qwen3_vl(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A GGUF encoder with its mmproj, free to be changed."""
    write_gguf_encoder(tmp_path / "Qwen3VL-8B-Instruct-Q8_0.gguf", folder, "Q8_0")
    write_gguf_mmproj(tmp_path / "mmproj-Qwen3VL-8B-Instruct-F16.gguf", folder, "F16")
    return tmp_path / "Qwen3VL-8B-Instruct-Q8_0.gguf"


def test_each_encoder_passes_in_its_own_place_only(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    make_text_encoder(tokenizer, TextSize(), seed=2).save_pretrained(tmp_path)
    ours, older = open_checkpoint(folder), open_checkpoint(tmp_path)
    assert identify(ours.tensors) is QWEN3_VL
    assert identify(older.tensors) is QWEN25_VL
    sort_text_encoder(ours)
    sort_qwen25_vl(older)
    with pytest.raises(WrongModel, match=r"is a Qwen3-VL text encoder .*; a Qwen2\.5-VL text encoder is needed here"):
        sort_qwen25_vl(ours)
    with pytest.raises(
        WrongModel, match=r"is a Qwen2\.5-VL text encoder .*; a Qwen3-VL text encoder is needed .*qwen3vl_8b_int8_con"
    ):
        sort_text_encoder(older)


def test_qwen3_without_eyes_is_no_qwen3_vl(folder: Path, copied: Path, tmp_path: Path) -> None:
    text = {
        name.replace("language_model.", ""): value
        for name, value in load_file(folder / "model.safetensors").items()
        if "visual." not in name
    }
    save_file(text, tmp_path / "qwen_3_8b.safetensors")
    write_gguf_encoder(tmp_path / "Qwen3-8B-Q8_0.gguf", folder, "Q8_0", architecture="qwen3")
    for name in ("qwen_3_8b.safetensors", "Qwen3-8B-Q8_0.gguf"):
        with pytest.raises(WrongModel, match=r"is the text encoder of another model .*a Qwen3-VL text encoder is"):
            sort_text_encoder(open_checkpoint(tmp_path / name))
    assert len(sort_text_encoder(open_checkpoint(copied)).layers) == 4


def test_the_size_with_experts_is_no_encoder_of_ours(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    names = ("language_model.layers.0.mlp.experts.gate_up_proj", "visual.deepstack_merger_list.0.norm.weight")
    file = write_model(tmp_path / "m.safetensors", {f"model.{name}": (4,) for name in names})
    assert identify(open_checkpoint(file).tensors) is foreign.OTHER_TEXT_ENCODER


@pytest.mark.parametrize(("hidden", "fits"), [(2560, False), (4096, True), (5120, False)])
def test_another_size_of_qwen3_vl_is_named(
    hidden: int, fits: bool, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    transformer = open_checkpoint(write_model(tmp_path / "t.safetensors", {"txt_in.text_norm.weight": (4096,)}))
    encoder = text_encoder_checkpoint(layers=1, hidden=hidden)
    if fits:
        require_fitting_encoder(transformer, encoder)
        return
    with pytest.raises(WrongModel, match=rf"of {hidden} numbers, .*takes 4096: it is another size of Qwen3-VL"):
        require_fitting_encoder(transformer, encoder)


def test_the_8b_needs_no_configuration() -> None:
    tensors = sort_text_encoder(text_encoder_checkpoint(torch.bfloat16))
    # https://huggingface.co/Qwen/Qwen3-VL-8B-Instruct, config.json
    assert tensors.config == {
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 5e6,
        "mrope_section": (24, 20, 20),
    }  # fmt: skip


def test_the_8bs_eyes_need_no_configuration(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    text = {name: entry.shape for name, entry in text_encoder_checkpoint(layers=1).tensors.items()}
    vision = {
        "patch_embed.proj.weight": (1152, 3, 2, 16, 16),
        "pos_embed.weight": (2304, 1152),
        "merger.linear_fc2.weight": (4096, 4608),
        **{f"deepstack_merger_list.{i}.norm.weight": (4608,) for i in range(3)},
        **{f"blocks.{i}.mlp.linear_fc1.weight": (4304, 1152) for i in range(27)},
    }
    shapes = text | {f"model.visual.{name}": shape for name, shape in vision.items()}
    assert sort_vision(open_checkpoint(write_model(tmp_path / "m.safetensors", shapes))).config == {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "in_channels": 3,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 4096,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
    }  # fmt: skip


def test_an_mmproj_states_what_its_folder_does(folder: Path, copied: Path) -> None:
    assert sort_vision(open_checkpoint(copied)).config == sort_vision(open_checkpoint(folder)).config


def test_the_mmproj_of_qwen25_vl_is_refused(folder: Path, copied: Path) -> None:
    (mmproj,) = copied.parent.glob("mmproj*")
    write_gguf_mmproj(mmproj, folder, "F16", projector="qwen2.5vl_merger")
    with pytest.raises(WrongModel, match=r"projector 'qwen2\.5vl_merger'\); the vision part of Qwen3-VL .*is needed"):
        sort_vision(open_checkpoint(copied))


def test_beside_both_models_vision_parts_each_encoder_finds_its_own(
    folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Whatever their names are, where these decide nothing."""
    make_text_encoder(tokenizer, TextSize(), seed=2).save_pretrained(tmp_path / "older")
    config = json.loads((tmp_path / "older" / "config.json").read_text(encoding="utf-8"))
    weights = load_file(tmp_path / "older" / "model.safetensors")
    write_gguf_text_encoder(tmp_path / "first.gguf", weights, config, "Q8_0")
    write_gguf_encoder(tmp_path / "second.gguf", folder, "Q8_0")
    before = mmproj_identity(open_checkpoint(tmp_path / "second.gguf"))
    write_gguf_vision(tmp_path / "mmproj-F16.gguf", weights, config, "F16")
    write_gguf_mmproj(tmp_path / "mmproj-Qwen3VL-8B-Instruct-F16.gguf", folder, "F16")
    (tmp_path / "mmproj-damaged.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingFile, match="2 files beside it could be its vision part"):
        sort_vision(open_checkpoint(tmp_path / "second.gguf"))
    (tmp_path / "mmproj-damaged.gguf").unlink()
    assert sort_qwen25_vision(open_checkpoint(tmp_path / "first.gguf")).checkpoint.path.name == "mmproj-F16.gguf"
    assert "Qwen3VL" in sort_vision(open_checkpoint(tmp_path / "second.gguf")).checkpoint.path.name
    assert before == ""
    assert mmproj_identity(open_checkpoint(tmp_path / "second.gguf")) != ""


@pytest.mark.parametrize("indexes", [[1, 2], [1, 2, 5], "all"])
def test_a_deepstack_that_does_not_fit_is_named(indexes: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["vision_config"]["deepstack_visual_indexes"] = indexes
    (tmp_path / "m" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(WrongModel, match=r"3 mergers after the blocks .* do not fit together"):
        sort_vision(open_checkpoint(tmp_path / "m"))
