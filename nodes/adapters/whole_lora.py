"""LoRAs of kinds that ComfyUI's weight adapters compute, and our engine does not: OFT, BOFT, GLoRA. Has no formula."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from comfy.weight_adapter import BOFTAdapter, GLoRAAdapter, OFTAdapter
from torch import Tensor

from ...engine.errors import Unsupported, WrongModel
from ...engine.files.checkpoint import TensorEntry
from ...engine.lora.deltas import Delta
from ...engine.lora.lora_file import LoraFile, LoraMatch, match
from ...engine.lora.row_cuts import placed
from ...engine.lora.whole_change import WholeChange
from ...engine.models.layer_rows import NO_OTHER_NAMES, OtherNames, shapes_by_any_name
from .native_lora import PREFIX, by_layers, entry_of, lora_of_patches, weight_of

_KINDS: Mapping[type, str] = {OFTAdapter: "OFT", BOFTAdapter: "BOFT", GLoRAAdapter: "GLoRA"}
# weights in fp32, and as many numbers as the parts have, that an adapter holds at a time (tests measure it)
_WEIGHTS, _PARTS = 4, 12


@dataclass(frozen=True)
class AdapterChange(WholeChange):
    """One of ComfyUI's adapters: its class, and its values in order, of which tensors are parts of the change."""

    adapter: type
    weight_shape: tuple[int, int]
    values: tuple[TensorEntry | float | None, ...]

    @property
    def kind(self) -> str:
        return _KINDS[self.adapter]

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight_shape

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return tuple(value for value in self.values if isinstance(value, TensorEntry))

    @property
    def allocated_bytes(self) -> int:
        return 4 * (_WEIGHTS * prod(self.shape) + _PARTS * sum(prod(part.shape) for part in self.parts))

    def change(self, weight: Tensor, parts: Sequence[Tensor], strength: float) -> None:
        given = iter(parts)
        values = tuple(next(given) if isinstance(value, TensorEntry) else value for value in self.values)
        if not _calculate(self.adapter, weight, values, strength):
            raise Unsupported(
                "ComfyUI's {kind} adapter failed; ComfyUI's log says why. Remove the LoRA.",
                code="lora.adapter_failed",
                kind=self.kind,
            )


def whole_kinds(patches: Mapping[Any, Any]) -> dict[str, Any]:
    """Those of ComfyUI's patches that are of such a kind."""
    return {key: patch for key, patch in patches.items() if type(patch) in _KINDS}


def match_patches(
    patches: Mapping[Any, Any],
    weights: Mapping[str, tuple[int, ...]],
    others: OtherNames = NO_OTHER_NAMES,
    *,
    model: str = "Qwen-Image",
) -> LoraMatch:
    """What patches of any kind change, as comfy.lora.load_lora gives them: a weight's name in ComfyUI's model, or a
    tuple of it and of its rows -> patch. The rest as `match` takes it.

    Raises WrongModel where a shape does not fit, Unsupported for kinds that nothing here computes.
    """
    named = by_layers(patches, others)
    whole, path = whole_kinds(named), Path("the LoRA of another node")
    rest = {key: patch for key, patch in named.items() if key not in whole}
    deltas = dict(match(lora_of_patches(rest), weights, others, model=model).deltas) if rest else {}
    shapes = shapes_by_any_name(weights, others)
    for key, adapter in whole.items():
        deltas |= placed(_delta(key.removeprefix(PREFIX), adapter, shapes, model), weights, others, path)
    tensors = {part.file.name: part for delta in deltas.values() for part in delta.parts}
    file = LoraFile(path, tensors, {}, f"memory {id(patches)}")
    return LoraMatch(file, deltas, ())


def match_file(lora: LoraFile, model: Any) -> LoraMatch | None:
    """A file of such a kind, read by ComfyUI's own reader, its matrices held in RAM; None for other files.

    Raises DamagedFile where the file has changed since it was opened.
    """
    read_by_comfyui = comfy.utils.load_torch_file(str(lora.path), safe_load=True)
    # it maps the file: what is written there later would be read as the LoRA
    tensors = comfy.lora_convert.convert_lora({key: tensor.clone() for key, tensor in read_by_comfyui.items()})
    lora.require_unchanged()
    patches = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(model, {}), log_missing=False)
    patches = {key: patch for key, patch in patches.items() if weight_of(key).startswith(PREFIX)}
    whole, transformer = whole_kinds(patches), model.transformer
    if not whole:
        return None
    found = match_patches(patches, transformer.weights, transformer.other_names, model=transformer.model)
    read = next(iter(whole.values())).loaded_keys  # one set, of all patches
    return LoraMatch(lora, found.deltas, tuple(key for key in lora.tensors if key not in read))


def _delta(name: str, adapter: Any, weights: Mapping[str, tuple[int, ...]], model: str) -> Delta:
    shape = weights.get(name, ())
    if len(shape) != 2:
        raise WrongModel(
            "A LoRA changes {name}, which is not a matrix of this model. Choose a LoRA for {model}.",
            code="lora.changes_no_matrix",
            name=name,
            model=model,
        )
    values = tuple(
        entry_of(f"{name}.{i}", value) if isinstance(value, Tensor) else value
        for i, value in enumerate(adapter.weights)
    )
    kind: Any = type(adapter)
    shapes = tuple(value.shape if isinstance(value, TensorEntry) else value for value in values)
    if not _fits(kind, shape, shapes):
        raise WrongModel(
            "ComfyUI's {kind} adapter does not fit {name} {shape}; its parts are {shapes:.199}. ComfyUI's log says "
            "why. Choose a LoRA for {model}.",
            code="lora.adapter_does_not_fit",
            kind=_KINDS[type(adapter)],
            name=name,
            shape=list(shape),
            shapes=", ".join(map(str, shapes)),
            model=model,
        )
    return Delta(name, shape, AdapterChange(type(adapter), (shape[0], shape[1]), values))


@lru_cache(maxsize=64)
def _fits(adapter: type, shape: tuple[int, ...], values: tuple[Any, ...]) -> bool:
    """Whether the adapter changes a weight of that shape: tried without data. Tuples in `values` are tensors' shapes.

    A constraint compares the data, and is left out; None stays, which not all adapters take.
    """
    made = (torch.empty(v, device="meta") if isinstance(v, tuple) else v and 0.0 for v in values)
    return _calculate(adapter, torch.empty(shape, device="meta"), tuple(made), 1.0)


def _calculate(adapter: type, weight: Tensor, values: tuple[Any, ...], strength: float) -> bool:
    """Change `weight` in place; False where the adapter did not, which logs its errors and goes on."""
    done = False

    def note(change: Tensor) -> Tensor:  # the adapter's last step but one
        nonlocal done
        done = True
        return change

    changed = adapter(set(), values).calculate_weight(weight, "", strength, 1.0, None, note, torch.float32)
    if changed is not weight:
        weight.copy_(changed)
    return done
