"""ComfyUI's asym_w4a8_int8 decodes as comfy-kitchen decodes it, where that is new enough to have the format."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_files import note_bytes
from kitchen_w4a8 import has_w4a8
from qwenimage_lowvram.engine.errors import CheckpointError, DamagedFile, MissingPackage, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.formats import COMFY_QUANT, FORMATS, StoredParam, stored_param
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen3_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.streaming import read_params
from safetensors.torch import load_file, save_file
from small_checkpoint import make_tokenizer
from small_qwen3_vl import Size, make_qwen3_vl, write_comfyui_file

NOTE = {"format": "asym_w4a8_int8", "group_size": 16, "convrot": True, "convrot_groupsize": 256}


with_format = pytest.mark.skipif(not has_w4a8(), reason="this comfy-kitchen is older than the format (0.2.27)")


def parts_of(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Any numbers that a file may hold."""
    generator = torch.Generator().manual_seed(rows)
    return {
        "weight": torch.randint(-128, 128, (rows, columns // 2), generator=generator, dtype=torch.int8),
        "weight_s_rel": (torch.rand(rows, columns // 16, generator=generator) * 100 + 20).to(torch.float8_e4m3fn),
        "weight_s_channel": torch.rand(rows, generator=generator) / 1000,
        "weight_codebook": torch.linspace(-1, 1, 16) ** 3,
    }


def described(folder: Path, parts: dict[str, torch.Tensor], note: dict[str, Any] = NOTE) -> Any:
    tensors = {f"layer.{part}": value for part, value in parts.items()} | {"layer.comfy_quant": note_bytes(note)}
    save_file(tensors, folder / "m.safetensors")
    checkpoint = open_checkpoint(folder / "m.safetensors")
    return COMFY_QUANT.describe(checkpoint.tensors, checkpoint.metadata, checkpoint.path)


@with_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(96, 512), (7, 256), (1100, 2048)], ids=str)
@pytest.mark.parametrize("kind", ["with a codebook", "without", "with scales as bytes"])
def test_a_weight_decodes_bit_for_bit_as_comfyui_does(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    import comfy_kitchen

    parts = parts_of(*shape)
    if kind == "without":
        del parts["weight_codebook"]
    expected = comfy_kitchen.dequantize_w4a8_int8_weight(
        parts["weight"],
        parts["weight_s_rel"],
        parts["weight_s_channel"],
        codebook=parts.get("weight_codebook"),
        output_dtype=dtype,
    )
    if kind == "with scales as bytes":
        parts["weight_s_rel"] = parts["weight_s_rel"].view(torch.uint8)
    ours = read_params(described(tmp_path, parts), {"layer.weight": shape}, dtype, "m")["layer.weight"]
    assert torch.equal(ours, expected)
    assert ours.float().std() > 0


@with_format
def test_scales_as_bytes_are_known_as_fp8(tmp_path: Path) -> None:
    parts = parts_of(8, 512)
    parts["weight_s_rel"] = parts["weight_s_rel"].view(torch.uint8)
    param = stored_param("layer.weight", described(tmp_path, parts), "m")
    assert [FORMATS.casts_fp8(part) for part in param.parts] == [False, True, False, False]


@with_format
def test_a_weight_that_comfy_kitchen_quantized_comes_back_within_the_formats_error(tmp_path: Path) -> None:
    from comfy_kitchen.tensor import AsymW4A8Int8Layout

    weight = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0))
    data, params = AsymW4A8Int8Layout.quantize(weight)
    stored = AsymW4A8Int8Layout.state_dict_tensors(data, params)
    parts = {f"weight{suffix}": value for suffix, value in stored.items()}
    ours = read_params(described(tmp_path, parts), {"layer.weight": (128, 1024)}, torch.float32, "m")["layer.weight"]
    assert (ours - weight).norm() / weight.norm() < 0.12


@with_format
def test_a_text_encoder_in_it_encodes_within_the_formats_error(tmp_path: Path, comfyui_path: Path) -> None:
    """As ComfyUI's file of Qwen3-VL-8B: matrices of the layers in it, the rest in bf16."""
    from comfy_kitchen.tensor import AsymW4A8Int8Layout

    tokenizer = make_tokenizer(full=False, comfyui=comfyui_path)
    size = Size(hidden=256, heads=8, kv_heads=2, intermediate=512, layers=3)
    make_qwen3_vl(tokenizer, size).save_pretrained(tmp_path / "folder")
    file = write_comfyui_file(tmp_path / "bf16.safetensors", tmp_path / "folder")
    stored: dict[str, torch.Tensor] = {}
    for name, value in load_file(file).items():
        if ".layers." in name and value.ndim == 2:
            data, params = AsymW4A8Int8Layout.quantize(value.float())
            parts = AsymW4A8Int8Layout.state_dict_tensors(data, params)
            stored |= {f"{name}{suffix}": part for suffix, part in parts.items()}
            stored[f"{name.removesuffix('.weight')}.comfy_quant"] = note_bytes(NOTE)
        else:
            stored[name] = value
    config = (tmp_path / "folder" / "config.json").read_text(encoding="utf-8")
    save_file(stored, tmp_path / "w4a8.safetensors", metadata={"config": config})
    hardware = Hardware.detect(torch.device("cpu"))
    ids = [tokenizer.encode("a cat on a chair")]
    states, read = [], []
    for name in ("w4a8", "bf16"):
        encoder = TextEncoder(open_checkpoint(tmp_path / f"{name}.safetensors"), dtype=torch.float32, hardware=hardware)
        states += encoder.encode(ids)
        read.append(encoder.fetched_bytes)
    assert 0 < (states[0] - states[1]).norm() / states[1].norm() < 0.25
    assert read[0] < 0.35 * read[1]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight_s_channel": None}, DamagedFile, r"do not match its quantization note \(asym_w4a8_int8\)"),
        ({"weight_s_rel": None}, DamagedFile, "do not match its quantization note"),
        ({"weight_codebook": torch.zeros(15)}, DamagedFile, "do not match its quantization note"),
        ({"weight": torch.zeros(8, 384, dtype=torch.int8)}, WrongModel, "6-bit codes, which are not supported"),
        ({"weight_correction": torch.zeros(32, 8)}, WrongModel, "has a weight_correction"),
        ({"convrot_groupsize": 128}, WrongModel, "rotated in groups of 128, which is not supported"),
        ({"group_size": "x"}, DamagedFile, "do not match its quantization note"),
    ],
)
def test_what_is_no_whole_layer_is_named(
    change: dict[str, Any], error: type[CheckpointError], words: str, tmp_path: Path
) -> None:
    parts, note = parts_of(8, 512), dict(NOTE)
    for key, value in change.items():
        if key in note:
            note[key] = value
        elif value is None:
            del parts[key]
        else:
            parts[key] = value
    with pytest.raises(error, match=words):
        described(tmp_path, parts, note)


def test_a_comfy_kitchen_without_the_format_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    with pytest.raises(MissingPackage, match=r"holds weights in asym_w4a8_int8, .*comfy-kitchen, 0\.2\.27 or newer"):
        described(tmp_path, parts_of(8, 512))


def test_notes_that_name_an_attention_kernel_are_read_and_ignored(tmp_path: Path) -> None:
    kernel = {"attention": "sage2_int8", "format": "int8_attention"}
    tensors = {
        "block.attn.comfy_quant": note_bytes(kernel),
        "block.attn.to_q.weight": torch.zeros(16, 32, dtype=torch.int8),
        "block.attn.to_q.weight_scale": torch.ones(()),
        "block.attn.to_q.comfy_quant": note_bytes({"format": "int8_tensorwise", "attention": "sage2_int8"}),
    }
    layers = json.dumps({"layers": {"block.attn": kernel}})
    save_file(tensors, tmp_path / "m.safetensors", metadata={"_quantization_metadata": layers})
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    found = COMFY_QUANT.describe(checkpoint.tensors, checkpoint.metadata, checkpoint.path)
    param: StoredParam = stored_param("block.attn.to_q.weight", found, "m")
    assert param.codec == "int8"
    assert not any(name.endswith("comfy_quant") for name in found)
