"""LoRAs that ComfyUI's own loaders have read, as files in memory that our engine understands. Copies no matrix."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from comfy.weight_adapter import BypassInjectionManager, LoHaAdapter, LoKrAdapter, LoRAAdapter
from torch import Tensor

from ...engine.files.checkpoint import TensorEntry
from ...engine.formats import TORCH_DTYPES
from ...engine.lora.lora_file import LoraFile
from ...engine.models.layer_rows import OtherNames
from .graph_checks import refuse

PREFIX = "diffusion_model."  # of a weight's name in ComfyUI's model

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# of each of ComfyUI's adapters: what its weights are called in files, in their order; None is a number
_ADAPTERS = {
    LoRAAdapter: ("lora_up.weight", "lora_down.weight", "alpha", "lora_mid.weight", "dora_scale", None),
    LoHaAdapter: ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale"),
    LoKrAdapter: (
        "lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale",
    ),
}  # fmt: skip


def weight_of(key: Any) -> str:
    """The weight's name in the key of a patch, which names a part of a weight where it is a tuple."""
    return str(key if isinstance(key, str) else key[0])


def by_layers(patches: Mapping[Any, Any], others: OtherNames) -> dict[str, Any]:
    """Patches of ComfyUI's by names of layers alone: rows of a joined weight, (name, (0, start, count)), by the name of
    the layer whose they are. Raises Unsupported for other parts of weights."""
    layers = {(f"{PREFIX}{rows[0].weight}", rows[0].start, rows[0].stop): name for name, rows in others.items()}
    named = {}
    for key, patch in patches.items():
        if isinstance(key, str):
            named[key] = patch
            continue
        layer = None
        if len(key) == 2 and key[1] is not None:
            dim, start, count = key[1]
            layer = None if dim else layers.get((key[0], start, start + count))
        if layer is None:
            refuse(
                "A LoRA that changes only part of a weight ({key})",
                "use another file.",
                code="graph.lora_of_a_part",
                key=key[0],
            )
        named[f"{PREFIX}{layer}"] = patch
    return named


def lora_of_patches(patches: Mapping[str, Any]) -> LoraFile:
    """The LoRA that ComfyUI's own loader has read, as a file in memory.

    `patches`: a weight's name in ComfyUI's model -> adapter, as comfy.lora.load_lora gives them. Raises Unsupported
    for kinds that are not computed here.
    """
    tensors: dict[str, TensorEntry] = {}
    for key, adapter in patches.items():
        layer = key.removeprefix(PREFIX).removesuffix(".weight")
        if isinstance(adapter, tuple) and adapter[0] == "diff":
            bias = key.endswith(".bias")
            name = f"{layer.removesuffix('.bias')}.diff_b" if bias else f"{layer}.diff"
            tensors[name] = entry_of(name, adapter[1][0])
            continue
        names = _ADAPTERS.get(type(adapter))
        if names is None:
            kind = adapter[0] if isinstance(adapter, tuple) else type(adapter).__name__
            refuse(
                "A LoRA of the kind {kind!r} ({key})",
                "use a LoRA, LoHa or LoKr.",
                code="graph.lora_kind",
                kind=kind,
                key=key,
            )
        for part, value in zip(names, adapter.weights, strict=False):
            if part is not None and value is not None:
                full = f"{layer}.{part}"
                tensors[full] = entry_of(full, value if isinstance(value, Tensor) else torch.tensor(float(value)))
    path = Path("the LoRA of another node")
    return LoraFile(path, tensors, {}, f"memory {id(patches)}")


def bypass_adapters(injection: Any) -> dict[str, tuple[Any, float]]:
    """What ComfyUI's bypass LoRA loader would inject: a layer's name -> (adapter, strength); empty for other code.

    An injection is two functions; what they work on is known to their manager alone.
    """
    if not inspect.isfunction(injection.inject):
        return {}
    held = inspect.getclosurevars(injection.inject).nonlocals.values()
    managers = [value for value in held if isinstance(value, BypassInjectionManager)]
    return {name: given for manager in managers for name, given in manager.adapters.items()}


def entry_of(name: str, tensor: Tensor) -> TensorEntry:
    """A tensor in host memory as something to be read; shares its memory."""
    data = tensor.detach().cpu().contiguous()
    raw = data.view(-1).view(torch.uint8).numpy() if data.ndim else data.view(1).view(torch.uint8).numpy()
    return TensorEntry(Path(name), 0, data.nbytes, _DTYPE_NAMES[data.dtype], tuple(data.shape), data=memoryview(raw))
