"""A stored weight decodes to what its format says, rounded once; what no codec reads is refused by name."""

from pathlib import Path

import pytest
import torch
from qwenimage_lowvram.engine.errors import WrongModel
from qwenimage_lowvram.engine.files.checkpoint import TensorEntry, open_checkpoint
from qwenimage_lowvram.engine.formats import CODECS, decode_alone, stored_param
from qwenimage_lowvram.engine.formats.scaled_fp8 import SCALED_FP8
from qwenimage_lowvram.engine.streaming import read_params
from safetensors.torch import save_file

COMPUTE = [torch.float32, torch.bfloat16, torch.float16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def _weight(rows: int = 24, columns: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def _decoded(codec: str, parts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    out = torch.full(parts[0].shape, float("nan"), dtype=dtype)
    decode_alone(CODECS[codec], out, parts)
    return out


@pytest.mark.parametrize("dtype", COMPUTE)
@pytest.mark.parametrize("codec", ["bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2"])
def test_a_plain_weight_is_rounded_to_its_format_and_then_to_the_compute_dtype(codec: str, dtype: torch.dtype) -> None:
    weight = _weight()
    (stored,) = CODECS[codec].encode(weight)
    assert stored.nbytes * 8 == weight.numel() * {"bf16": 16, "fp16": 16, "fp32": 32}.get(codec, 8)
    assert torch.equal(_decoded(codec, (stored,), dtype), stored.float().to(dtype))
    # half a step of the format's mantissa
    assert (stored.float() - weight).abs().max() <= weight.abs().max() * torch.finfo(stored.dtype).eps / 2


@pytest.mark.parametrize("dtype", COMPUTE)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("codec", SCALED_FP8, ids=lambda codec: codec.name)
def test_a_scaled_weight_is_the_product_rounded_once(codec: object, per_row: bool, dtype: torch.dtype) -> None:
    weight = _weight() * torch.logspace(-1, 1, 24)[:, None]
    data, scale = codec.encode(weight, per_row=per_row)  # type: ignore[attr-defined]
    reference = data.float() * scale.float()
    assert torch.equal(_decoded(codec.name, (data, scale), dtype), reference.to(dtype))  # type: ignore[attr-defined]
    step = torch.finfo(data.dtype).eps / 2
    rows = weight.abs().amax(dim=1, keepdim=True) if per_row else weight.abs().max()
    assert ((reference - weight).abs() <= rows * step * 1.01).all()


@pytest.mark.parametrize("codec", SCALED_FP8, ids=lambda codec: codec.name)
@pytest.mark.parametrize("per_row", [False, True])
def test_a_row_of_zeros_stays_zero(codec: object, per_row: bool) -> None:
    data, scale = codec.encode(torch.zeros(4, 4), per_row=per_row)  # type: ignore[attr-defined]
    assert not _decoded(codec.name, (data, scale), torch.bfloat16).any()  # type: ignore[attr-defined]


SCALE_SHAPES = {
    "one number": (),
    "one element": (1,),
    "one row": (1, 1),
    "a column of rows": (24, 1),
    "a flat list of rows": (24,),
}


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("key", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", SCALE_SHAPES.values(), ids=SCALE_SHAPES.keys())
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_scaled_files_of_every_spelling_are_read(
    dtype: torch.dtype, key: str, shape: tuple[int, ...], scale_dtype: torch.dtype, tmp_path: Path
) -> None:
    data = _weight().mul(100).to(dtype)
    scale = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) / 50 + 0.001).to(scale_dtype)
    tensors = {
        "layer.weight": data,
        "layer.bias": torch.randn(24).bfloat16(),
        f"layer.{key}": scale,
        # what such files hold besides, and what has no part in the weight
        "layer.scale_input": torch.ones(()),
        "layer.input_scale": torch.ones(1),
        "scaled_fp8": torch.empty(0, dtype=dtype),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    entries = open_checkpoint(tmp_path / "m.safetensors").tensors
    shapes = {"layer.weight": (24, 40), "layer.bias": (24,)}
    read = read_params(entries, shapes, torch.bfloat16, "m.safetensors")
    factor = scale.float().reshape(-1, 1) if scale.numel() > 1 else scale.float().reshape(())
    assert torch.equal(read["layer.weight"], (data.float() * factor).bfloat16())
    assert torch.equal(read["layer.bias"], tensors["layer.bias"])


def _entry(dtype: str, *shape: int) -> TensorEntry:
    return TensorEntry(Path("m.safetensors"), 0, 1, dtype, shape)


WEIGHT = "attn.to_q.weight"
UNKNOWN = {
    "int8 without a note": {"weight": _entry("I8", 8, 64), "weight_scale": _entry("F32")},
    "int8 without scale": {"weight": _entry("I8", 8, 64)},
    "int8 with a note, without scale": {"weight": _entry("INT8", 8, 64)},
    "rotated int8 in blocks": {"weight": _entry("INT8_CONVROT64", 8, 64), "weight_scale": _entry("F32", 8, 2)},
    "rotated int8 with zero points": {
        "weight": _entry("INT8_CONVROT64", 8, 64),
        "weight_scale": _entry("F32", 8, 1),
        "weight_zero_point": _entry("I8", 8, 1),
    },
    "nvfp4": {
        "weight": _entry("U8", 8, 32),
        "weight_scale": _entry("F8_E4M3", 8, 4),
        "weight_scale_2": _entry("F32"),
    },
    "mxfp8": {"weight": _entry("F8_E4M3", 8, 64), "weight_scale": _entry("U8", 8, 2)},
    "mxfp8 with exponents": {"weight": _entry("F8_E4M3", 8, 64), "weight_scale": _entry("F8_E8M0", 8, 2)},
    "fp8 in blocks": {"weight": _entry("F8_E4M3", 8, 64), "weight_scale": _entry("F32", 4, 32)},
    "fp8 in blocks, inverse": {"weight": _entry("F8_E4M3", 8, 64), "weight_scale_inv": _entry("F32", 1, 1)},
    "fp8 scaled twice": {
        "weight": _entry("F8_E4M3", 8, 64),
        "weight_scale": _entry("F32"),
        "scale_weight": _entry("F32"),
    },
    "fp8 with a scale of SDNQ's": {"weight": _entry("F8_E4M3", 8, 64), "scale": _entry("F32", 8, 1)},
    "fp8 with a low-rank part": {
        "weight": _entry("F8_E4M3", 8, 64),
        "weight_scale": _entry("F32", 8, 1),
        "svd_up": _entry("BF16", 8, 4),
    },
    "fp8 of modelopt, smoothed": {
        "weight": _entry("F8_E4M3", 8, 64),
        "weight_scale": _entry("F32"),
        "pre_quant_scale": _entry("BF16", 64),
    },
    "scaled bf16": {"weight": _entry("BF16", 8, 64), "weight_scale": _entry("F32")},
    "bitsandbytes nf4": {"weight": _entry("U8", 256, 1), "weight.absmax": _entry("F32", 8)},
    "bitsandbytes int8, scales of another count": {"weight": _entry("I8", 8, 64), "SCB": _entry("F32", 4)},
    "a type of GGUF that is not read": {"weight": _entry("Q8_1", 8, 256)},
    "a dtype to come": {"weight": _entry("F4", 8, 64)},
}


@pytest.mark.parametrize("tensors", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_an_unknown_quantization_is_refused_by_the_layers_name(tensors: dict[str, TensorEntry]) -> None:
    layer = WEIGHT.removesuffix(".weight")
    with pytest.raises(WrongModel) as caught:
        stored_param(WEIGHT, {f"{layer}.{name}": entry for name, entry in tensors.items()}, "m.safetensors, block 3")
    message = str(caught.value)
    assert message.startswith(f"m.safetensors, block 3: {WEIGHT} is stored as {tensors['weight'].dtype}[")
    assert "in a quantization that is not supported" in message
    assert "Use a bf16, fp16, fp32, fp8 or fp8-scaled file" in message


def test_what_stands_beside_a_weight_of_an_unknown_quantization_is_named() -> None:
    tensors = {WEIGHT: _entry("F8_E4M3", 8, 64), "attn.to_q.scale": _entry("F32", 8, 1)}
    with pytest.raises(WrongModel, match=r"a quantization that is not supported \(beside it: scale\)"):
        stored_param(WEIGHT, tensors, "m.safetensors")


def test_lost_notes_and_numbers_that_are_no_quantization_are_called_so() -> None:
    scale = {"attn.to_q.weight_scale": _entry("F32", 8, 1)}
    with pytest.raises(WrongModel, match=r"beside it: weight_scale\)\. If ComfyUI quantized it, its notes"):
        stored_param(WEIGHT, {WEIGHT: _entry("I8", 8, 64), **scale}, "m.safetensors")
    with pytest.raises(WrongModel, match=r"is stored as F64\[8, 64\], which is not supported\. Save the model in fp32"):
        stored_param(WEIGHT, {WEIGHT: _entry("F64", 8, 64)}, "m.safetensors")


def test_scales_of_what_goes_in_and_out_change_no_weight() -> None:
    beside = {f"attn.to_q.{name}": _entry("F32") for name in ("input_scale", "scale_input", "output_scale", "bias")}
    assert stored_param(WEIGHT, {WEIGHT: _entry("F8_E4M3", 8, 64), **beside}, "m").codec == "fp8_e4m3fn"


def test_the_bytes_of_a_stored_weight_are_counted_with_its_scale(tmp_path: Path) -> None:
    save_file(
        {"w.weight": torch.zeros(8, 4, dtype=torch.float8_e4m3fn), "w.scale_weight": torch.ones(())},
        tmp_path / "m.safetensors",
    )
    param = stored_param("w.weight", open_checkpoint(tmp_path / "m.safetensors").tensors, "m")
    assert (param.codec, param.nbytes) == ("fp8_e4m3fn_scaled", 8 * 4 + 4)
