"""Weights the way ComfyUI quantizes them, and back, with its own library, comfy-kitchen (a second to import)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

KINDS = ("fp8mixed", "int8", "int8_row", "int8_convrot", "nvfp4", "mxfp8", "convrot_w4a4")
_NOTE = ".comfy_quant"


def quantized(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """What ComfyUI stores for a layer's matrix: `weight`, `weight_scale` and the note `comfy_quant`.

    kind: fp8mixed (one scale, and the `input_scale` that such layers have), int8 (one scale), int8_row (one for each
    row), int8_convrot and convrot_w4a4 (rows, rotated in groups of 256, or of the largest power of four that divides
    them), nvfp4 (with `weight_scale_2`) and mxfp8 (scales of 16 and 32 weights in tiles). Beside KINDS asym_w4a8_int8
    (with `weight_s_rel`, `weight_s_channel` and `weight_codebook`), which comfy-kitchen has from 0.2.27 on.
    """
    from comfy_kitchen.tensor import QuantizedTensor

    layout, options, note = _layout(weight, kind)
    tensor = QuantizedTensor.from_float(weight, layout, **options)
    parts = tensor.state_dict("weight") | {"comfy_quant": note_bytes(note)}
    return parts | {"input_scale": torch.tensor(0.5)} if kind == "fp8mixed" else parts


def _layout(weight: Tensor, kind: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """comfy-kitchen's name of a kind, its options for this weight, and ComfyUI's note of it."""
    group = next(size for size in (256, 64, 16) if weight.shape[1] % size == 0)
    if kind == "fp8mixed":
        return "TensorCoreFP8Layout", {"scale": "recalculate"}, {"format": "float8_e4m3fn"}
    if kind == "nvfp4":
        return "TensorCoreNVFP4Layout", {}, {"format": kind}
    if kind == "mxfp8":
        return "TensorCoreMXFP8Layout", {}, {"format": kind}
    if kind == "convrot_w4a4":
        rotation = {"convrot_groupsize": group}
        return "TensorCoreConvRotW4A4Layout", rotation, {"format": kind, **rotation}
    if kind == "asym_w4a8_int8":
        rotation = {"convrot_groupsize": group}
        return "AsymW4A8Int8Layout", rotation, {"format": kind, "group_size": 16, **rotation}
    note: dict[str, Any] = {"format": "int8_tensorwise"}
    if kind == "int8":
        return "TensorWiseINT8Layout", {}, note
    turned = {"convrot": True, "convrot_groupsize": group} if kind == "int8_convrot" else {}
    return "TensorWiseINT8Layout", {"per_channel": True, **turned}, note | turned


def note_bytes(note: dict[str, Any]) -> Tensor:
    """A note as a file holds it: JSON as bytes."""
    return torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)


def read_dequantized(file: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor of a file as comfy-kitchen decodes it to `dtype`, without notes and scales."""
    from comfy_kitchen import tensor

    layouts = {
        "float8_e4m3fn": tensor.TensorCoreFP8Layout,
        "int8_tensorwise": tensor.TensorWiseINT8Layout,
        "nvfp4": tensor.TensorCoreNVFP4Layout,
        "mxfp8": tensor.TensorCoreMXFP8Layout,
        "convrot_w4a4": tensor.TensorCoreConvRotW4A4Layout,
    }
    weights = load_file(file)
    for name in [name for name in weights if name.endswith(_NOTE)]:
        layer, note = name.removesuffix(_NOTE), json.loads(bytes(weights.pop(name).tolist()))
        data, scale = weights[f"{layer}.weight"], weights.pop(f"{layer}.weight_scale")
        weights.pop(f"{layer}.input_scale", None)
        settings = {key: value for key, value in note.items() if key.startswith("convrot")}
        if note["format"] == "nvfp4":
            settings["block_scale"], scale = scale, weights.pop(f"{layer}.weight_scale_2")
        layout = layouts[note["format"]]
        columns = data.shape[1] * (2 if note["format"] in ("nvfp4", "convrot_w4a4") else 1)
        params = layout.Params(scale=scale, orig_dtype=dtype, orig_shape=(len(data), columns), **settings)
        weights[f"{layer}.weight"] = layout.dequantize(data, params)
    return {name: value.to(dtype) for name, value in weights.items()}
