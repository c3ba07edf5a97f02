"""What ComfyUI notes beside the weights that it quantizes: each layer's format. Reads those notes, no weight.

A note is JSON such as `{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}`: the bytes of the
tensor `<layer>.comfy_quant`, or an entry of "layers" in the header's `_quantization_metadata` (ComfyUI's comfy/ops.py
_load_quantized_module and comfy/utils.py convert_old_quants). A layer without a note is stored plainly, so that a file
may mix formats. Weights alone are read: `input_scale` and `full_precision_matrix_mult` say how ComfyUI would quantize
what they are multiplied with, which stays as it is here.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import DamagedFile, MissingPackage, WrongModel
from ..files.checkpoint import TensorEntry
from ..files.json_texts import parse_json
from .int8_convrot import INT8_CONVROT, load_operator
from .kitchen import KITCHEN, MXFP8, SCALES, load_kitchen
from .kitchen_w4a8 import W4A8, W4A8_PARTS, load_w4a8
from .notes import read_notes

_NOTE = ".comfy_quant"
_HEADER = "_quantization_metadata"
# ComfyUI takes this prefix off before it reads the header's notes, which may be written with or without it
_PREFIX = "model.diffusion_model."
_STORED_AS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
# the dtypes of the data, of its scales, and of the tensor's scale; fp8 scales may be written as plain bytes
_KITCHEN_PARTS = {
    "nvfp4": (("U8",), ("F8_E4M3", "U8"), ("F32",)),
    "mxfp8": (("F8_E4M3",), ("F8_E8M0", "U8")),
    "convrot_w4a4": (("I8",), ("F32",)),
}
_W4A8 = "asym_w4a8_int8"
_W4A8_GROUP = 16  # weights that share a scale, where its note names none
_GROUP = 256  # where a rotated layer's note names none


def with_comfy_quants(
    tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str], path: Path
) -> dict[str, TensorEntry]:
    """The tensors without notes, with every weight that has one under the dtype that its codec is found by (INT8,
    INT8_CONVROT<group>, NVFP4, MXFP8, CONVROT_W4A4_<group>, ASYM_W4A8_INT8_<group>), in its logical shape.

    `metadata` is the header's, `path` names the model in errors. Raises DamagedFile where a note and its tensors
    disagree, WrongModel for a quantization that is not read here, MissingPackage where rotated weights need one.
    """
    result = {name: entry for name, entry in tensors.items() if not name.endswith(_NOTE)}
    for layer, note in _notes(tensors, metadata, path).items():
        if f"{layer}.weight" in tensors:
            result[f"{layer}.weight"] = _described(tensors, layer, note)
    kinds = {entry.dtype for entry in result.values()}
    if any(kind.startswith("INT8_CONVROT") for kind in kinds):
        _require_comfy_kitchen(path, "rotated int8 weights (convrot)", "0.2.15", load_operator)
    if kinds & set(KITCHEN):
        named = ", ".join(sorted(KITCHEN[kind].name for kind in kinds & set(KITCHEN)))
        _require_comfy_kitchen(path, f"weights in {named}", "0.2.26", load_kitchen)
    if MXFP8.dtype in kinds and not hasattr(torch, "float8_e8m0fnu"):
        raise MissingPackage(
            f"{path} holds weights in mxfp8, whose scales torch reads from 2.7 on; this is {torch.__version__}.\n\n"
            "What to do: update torch with ComfyUI, or use a file in bf16, fp8 or int8."
        )
    if kinds & set(W4A8):
        _require_comfy_kitchen(path, f"weights in {_W4A8}", "0.2.27", load_w4a8)
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
    if kind in _KITCHEN_PARTS:
        return _described_for_kitchen(tensors, layer, note, kind)
    if kind == _W4A8:
        return _described_w4a8(tensors, layer, note)
    if kind not in _STORED_AS:
        raise WrongModel(
            f"{where} is stored in ComfyUI's {kind!r:.99}, which is not supported. Use a file in bf16, fp8 or int8 "
            f"(formats of ComfyUI's that are read: {', '.join([*_STORED_AS, *_KITCHEN_PARTS, _W4A8])})."
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
    _require_group(group, entry.shape, where)
    return replace(entry, dtype=f"INT8_CONVROT{group}")


def _described_for_kitchen(
    tensors: Mapping[str, TensorEntry], layer: str, note: Mapping[str, Any], kind: str
) -> TensorEntry:
    entry = tensors[f"{layer}.weight"]
    where = f"{entry.file}: {f'{layer}.weight'!r}"
    group = _rotated_group({"convrot": True, **note}, where) if kind == "convrot_w4a4" else None
    codec = KITCHEN[kind.upper() if group is None else f"CONVROT_W4A4_{_require_group(group, None, where)}"]
    stored, *scale_dtypes = _KITCHEN_PARTS[kind]
    shape = (*entry.shape[:-1], entry.shape[-1] * codec.packed) if entry.shape else ()
    scales = [tensors.get(f"{layer}.{name}") for name in SCALES[: len(scale_dtypes)]]
    if f"{layer}.pre_quant_scale" in tensors:
        raise WrongModel(
            f"{where} has scales for what it is multiplied with (pre_quant_scale), which is not supported. Use a file "
            "in bf16, fp8 or int8."
        )
    fits = entry.dtype in stored and len(shape) == 2 and 0 not in shape and shape[1] % codec.block == 0
    counts = [codec.scale_count(shape), 1] if fits else []
    found = [(scale.dtype, prod(scale.shape)) if scale else None for scale in scales]
    if not fits or any(
        one is None or one[0] not in dtypes or one[1] != count
        for one, dtypes, count in zip(found, scale_dtypes, counts, strict=False)
    ):
        raise DamagedFile(
            f"{where}, {entry.dtype}{list(entry.shape)}, and its scales are not what its note promises, {kind}. "
            "Download it again."
        )
    if group is not None:
        _require_group(group, shape, where)
    return replace(entry, dtype=codec.dtype, shape=shape)


def _described_w4a8(tensors: Mapping[str, TensorEntry], layer: str, note: Mapping[str, Any]) -> TensorEntry:
    entry = tensors[f"{layer}.weight"]
    where = f"{entry.file}: {f'{layer}.weight'!r}"
    rotation = _require_group(_rotated_group({**note, "convrot": True}, where) or _GROUP, None, where)
    if f"{layer}.weight_correction" in tensors:
        raise WrongModel(
            f"{where} has a weight_correction, which neither ComfyUI reads nor this pack. Use a file in {_W4A8} "
            "without, or in bf16, fp8 or int8."
        )
    by_group, by_row, codebook = (tensors.get(f"{layer}.{part}") for part in W4A8_PARTS)
    size = _setting(note, "group_size", _W4A8_GROUP)
    groups = by_group.shape[-1] if by_group is not None and len(by_group.shape) == 2 else 0
    rows, columns = entry.shape[0] if entry.shape else 0, groups * size if type(size) is int else 0
    if len(entry.shape) == 2 and columns and entry.shape == (rows, columns * 3 // 4):
        raise WrongModel(f"{where} is {_W4A8} with codes of 6 bits, which is not supported. Use one with 4 bits.")
    found = [(part.dtype, part.shape) if part else None for part in (entry, by_group, by_row, codebook)]
    fits = (
        rows > 0
        and columns > 0
        and found[0] in (("I8", (rows, columns // 2)), ("U8", (rows, columns // 2)))
        and found[1] in [(dtype, (rows, groups)) for dtype in ("F8_E4M3", "U8", "F32")]
        and by_row is not None
        and (by_row.dtype, prod(by_row.shape)) == ("F32", rows)
        and found[3] in (None, ("F32", (16,)))
    )
    if not fits:
        raise DamagedFile(
            f"{where}, {entry.dtype}{list(entry.shape)}, and its scales are not what its note promises, {_W4A8}. "
            "Download it again."
        )
    _require_group(rotation, (rows, columns), where)
    return replace(entry, dtype=f"{_W4A8.upper()}_{rotation}", shape=(rows, columns))


def _require_group(group: int, shape: tuple[int, ...] | None, where: str) -> int:
    """The group, where rows can be rotated in it; a shape of None is not known yet."""
    if group not in INT8_CONVROT:
        raise WrongModel(
            f"{where} is rotated in groups of {group}, which is not supported. Use a file with groups of "
            f"{', '.join(map(str, INT8_CONVROT))} (ComfyUI's default is {_GROUP}), or one without convrot."
        )
    if shape is not None and (len(shape) != 2 or shape[1] % group):
        raise DamagedFile(f"{where} {list(shape)} cannot be rotated in groups of {group}. Download it again.")
    return group


def _rotated_group(note: Mapping[str, Any], where: str) -> int | None:
    """None for a layer that is not rotated. ComfyUI reads both settings from the note, or from its "params"."""
    if not _setting(note, "convrot", False):
        return None
    group = _setting(note, "convrot_groupsize", _GROUP)
    if type(group) is not int:
        raise DamagedFile(f"{where} is rotated in groups of {group!r:.99}. Download it again.")
    return group


def _setting(note: Mapping[str, Any], key: str, default: Any) -> Any:
    params = note.get("params")
    return {**(params if isinstance(params, dict) else {}), **note}.get(key, default)


def _require_comfy_kitchen(path: Path, what: str, version: str, load: Callable[[], Any]) -> None:
    try:
        load()
    except (ImportError, AttributeError) as error:
        raise MissingPackage(
            f"{path} holds {what}, which are read with the package comfy-kitchen, {version} or newer ({error}). "
            "Install it with `pip install comfy-kitchen`, update ComfyUI, which brings it, or use a file in bf16, fp8 "
            "or int8 without convrot."
        ) from error
