"""What ComfyUI notes beside the weights that it quantizes: each layer's format. Reads those notes, no weight.

A note is JSON such as `{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}`: the bytes of the
tensor `<layer>.comfy_quant`, or an entry of "layers" in the header's `_quantization_metadata` (ComfyUI's comfy/ops.py
_load_quantized_module and comfy/utils.py convert_old_quants). A layer without a note is stored plainly, so that a file
may mix formats. Weights alone are read: `input_scale` and `full_precision_matrix_mult` say how ComfyUI would quantize
what they are multiplied with, which stays as it is here.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import TensorEntry, parse_json
from ..errors import DamagedFile, MissingPackage, WrongModel
from .int8_convrot import INT8_CONVROT, load_operator
from .notes import read_notes

_NOTE = ".comfy_quant"
_HEADER = "_quantization_metadata"
# ComfyUI takes this prefix off before it reads the header's notes, which may be written with or without it
_PREFIX = "model.diffusion_model."
_STORED_AS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
_GROUP = 256  # where a rotated layer's note names none


def with_comfy_quants(
    tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str], path: Path
) -> dict[str, TensorEntry]:
    """The tensors without notes, with every int8 weight that has one as dtype INT8 or INT8_CONVROT<group>.

    `metadata` is the header's, `path` names the model in errors. Raises DamagedFile where a note and its tensors
    disagree, WrongModel for a quantization that is not read here, MissingPackage where rotated weights need one.
    """
    result = {name: entry for name, entry in tensors.items() if not name.endswith(_NOTE)}
    for layer, note in _notes(tensors, metadata, path).items():
        if f"{layer}.weight" in tensors:
            result[f"{layer}.weight"] = _described(tensors, layer, note)
    if any(entry.dtype.startswith("INT8_CONVROT") for entry in result.values()):
        _require_comfy_kitchen(path)
    return result


def _notes(tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """By layer; the header's count where both are there."""
    beside = read_notes({name: entry for name, entry in tensors.items() if name.endswith(_NOTE)})
    notes: dict[str, Any] = {name.removesuffix(_NOTE): note for name, note in beside.items()}
    if _HEADER in metadata:
        layers = parse_json(metadata[_HEADER], f"{path}: {_HEADER!r}").get("layers")
        if not isinstance(layers, dict) or not all(isinstance(note, dict) for note in layers.values()):
            raise DamagedFile(f"{path}: {_HEADER!r} has no table of 'layers'. Download it again.")
        prefix = _PREFIX if any(name.startswith(_PREFIX) for name in tensors) else ""
        notes |= {prefix + layer.removeprefix(prefix): note for layer, note in layers.items()}
    return notes


def _described(tensors: Mapping[str, TensorEntry], layer: str, note: Mapping[str, Any]) -> TensorEntry:
    entry, kind = tensors[f"{layer}.weight"], note.get("format")
    where = f"{entry.file}: {f'{layer}.weight'!r}"
    if not isinstance(kind, str):
        raise DamagedFile(f"{where} has a quantization note without a format. Download it again.")
    if kind not in _STORED_AS:
        raise WrongModel(
            f"{where} is stored in ComfyUI's {kind!r:.99}, which is not supported. Use a file in bf16, fp8 or int8 "
            f"(formats of ComfyUI's that are read: {', '.join(_STORED_AS)}, the last with or without convrot)."
        )
    if entry.dtype != _STORED_AS[kind] or f"{layer}.weight_scale" not in tensors:
        raise DamagedFile(
            f"{where}, {entry.dtype}{list(entry.shape)}, and its scale are not what its note promises, {kind}. "
            "Download it again."
        )
    if entry.dtype != "I8":
        return entry
    group = _rotated_group(note, where)
    if group is None:
        return replace(entry, dtype="INT8")
    if group not in INT8_CONVROT:
        raise WrongModel(
            f"{where} is rotated in groups of {group}, which is not supported. Use a file with groups of "
            f"{', '.join(map(str, INT8_CONVROT))} (ComfyUI's default is {_GROUP}), or one without convrot."
        )
    if len(entry.shape) != 2 or entry.shape[1] % group:
        raise DamagedFile(f"{where} {list(entry.shape)} cannot be rotated in groups of {group}. Download it again.")
    return replace(entry, dtype=f"INT8_CONVROT{group}")


def _rotated_group(note: Mapping[str, Any], where: str) -> int | None:
    """None for a layer that is not rotated. ComfyUI reads both settings from the note, or from its "params"."""
    params = note.get("params")
    settings = {**(params if isinstance(params, dict) else {}), **note}
    if not settings.get("convrot", False):
        return None
    group = settings.get("convrot_groupsize", _GROUP)
    if type(group) is not int:
        raise DamagedFile(f"{where} is rotated in groups of {group!r:.99}. Download it again.")
    return group


def _require_comfy_kitchen(path: Path) -> None:
    try:
        load_operator()
    except (ImportError, AttributeError) as error:
        raise MissingPackage(
            f"{path} holds rotated int8 weights (convrot), which are read with the package comfy-kitchen, 0.2.15 or "
            f"newer ({error}). Install it with `pip install comfy-kitchen`, update ComfyUI, which brings it, or use a "
            "file in bf16, fp8 or int8 without convrot."
        ) from error
