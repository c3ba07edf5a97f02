"""ComfyUI's own layers of a file's weights, to compare with. They need ComfyUI in this process: the fixture `comfy`."""

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

_NOTE = ".comfy_quant"


def comfyuis_formats() -> Collection[str]:
    """The names in notes that this ComfyUI reads."""
    formats: Collection[str] = import_module("comfy.quant_ops").QUANT_ALGOS
    return formats


def comfyuis_linear(
    weights: Mapping[str, Tensor], layer: str, shape: tuple[int, int], dtype: torch.dtype
) -> torch.nn.Module:
    """ComfyUI's own layer of a file's weights, which computes on them as ComfyUI does."""
    operations = import_module("comfy.ops")
    rows, columns = shape
    linear: torch.nn.Module = operations.mixed_precision_ops({}, compute_dtype=dtype).Linear(columns, rows, dtype=dtype)
    own = {key.removeprefix(f"{layer}."): value for key, value in weights.items() if key.startswith(f"{layer}.")}
    linear.load_state_dict({key: value.to(dtype) if key == "bias" else value.clone() for key, value in own.items()})
    return linear


def compute_as_comfyui(model: torch.nn.Module, file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Put ComfyUI's own layers in the places of those of `model` that are quantized in the file."""
    weights = load_file(file)
    for name in [name.removesuffix(_NOTE) for name in weights if name.endswith(_NOTE)]:
        linear = model.get_submodule(name)
        shape = (linear.out_features, linear.in_features)
        model.set_submodule(name, comfyuis_linear(weights, name, shape, dtype))
