"""Weights the way ComfyUI quantizes them, and back, with its own library, comfy-kitchen (a second to import)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

KINDS = ("fp8mixed", "int8", "int8_row", "int8_convrot")
_NOTE = ".comfy_quant"


def quantized(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """What ComfyUI stores for a layer's matrix: `weight`, `weight_scale` and the note `comfy_quant`.

    kind: fp8mixed (one scale, and the `input_scale` that such layers have), int8 (one scale), int8_row (one for each
    row), int8_convrot (rows, rotated in groups of 256, or of the largest power of four that divides them).
    """
    from comfy_kitchen.tensor import QuantizedTensor

    note: dict[str, Any] = {"format": "float8_e4m3fn" if kind == "fp8mixed" else "int8_tensorwise"}
    if kind == "fp8mixed":
        tensor = QuantizedTensor.from_float(weight, "TensorCoreFP8Layout", scale="recalculate")
    elif kind == "int8":
        tensor = QuantizedTensor.from_float(weight, "TensorWiseINT8Layout")
    elif kind == "int8_row":
        tensor = QuantizedTensor.from_float(weight, "TensorWiseINT8Layout", per_channel=True)
    else:
        group = next(size for size in (256, 64, 16) if weight.shape[1] % size == 0)
        rotation = {"convrot": True, "convrot_groupsize": group}
        tensor = QuantizedTensor.from_float(weight, "TensorWiseINT8Layout", per_channel=True, **rotation)
        note |= rotation
    parts = tensor.state_dict("weight") | {"comfy_quant": note_bytes(note)}
    return parts | {"input_scale": torch.tensor(0.5)} if kind == "fp8mixed" else parts


def note_bytes(note: dict[str, Any]) -> Tensor:
    """A note as a file holds it: JSON as bytes."""
    return torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)


def read_dequantized(file: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor of a file as comfy-kitchen decodes it to `dtype`, without notes and scales."""
    from comfy_kitchen.tensor import TensorCoreFP8Layout, TensorWiseINT8Layout

    weights = load_file(file)
    for name in [name for name in weights if name.endswith(_NOTE)]:
        layer, note = name.removesuffix(_NOTE), json.loads(bytes(weights.pop(name).tolist()))
        data, scale = weights[f"{layer}.weight"], weights.pop(f"{layer}.weight_scale")
        weights.pop(f"{layer}.input_scale", None)
        rotation = {key: value for key, value in note.items() if key.startswith("convrot")}
        layout = TensorCoreFP8Layout if note["format"] == "float8_e4m3fn" else TensorWiseINT8Layout
        params = layout.Params(scale=scale, orig_dtype=dtype, orig_shape=tuple(data.shape), **rotation)
        weights[f"{layer}.weight"] = layout.dequantize(data, params)
    return {name: value.to(dtype) for name, value in weights.items()}
