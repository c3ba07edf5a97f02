"""What ComfyUI notes beside the weights that it quantizes: each layer's format. Reads those notes, no weight.

A note is JSON such as `{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}`: the bytes of the
tensor `<layer>.comfy_quant`, or an entry of "layers" in the header's `_quantization_metadata` (ComfyUI's comfy/ops.py
_load_quantized_module and comfy/utils.py convert_old_quants). A layer without a note is stored plainly, so that a file
may mix formats. `input_scale` and `full_precision_matrix_mult` say how what they are multiplied with is quantized, or
that it is not: they matter where layers compute on stored weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DamagedFile, WrongModel
from ..files.json_texts import parse_json
from .comfy_notes import Note, NotedFormat
from .format import Format, Tensors
from .neighbours import EIGHT_BIT_OPERANDS, FULL_PRODUCTS
from .notes import read_notes

_NOTE = ".comfy_quant"
_HEADER = "_quantization_metadata"
# ComfyUI takes this prefix off before it reads the header's notes, which may be written with or without it
_PREFIX = "model.diffusion_model."


class ComfyQuant(Format):
    """Describes what notes tell; `members`, which stand in the list of formats too, say what each note means."""

    def __init__(self, members: tuple[NotedFormat, ...]) -> None:
        self.members = members

    def describe(self, tensors: Tensors, metadata: Mapping[str, str], path: Path) -> Tensors:
        """Without the notes, with every weight that has one under its format's own dtype, in its logical shape."""
        result = {name: entry for name, entry in tensors.items() if not name.endswith(_NOTE)}
        for layer, settings in _notes(tensors, metadata, path).items():
            if f"{layer}.weight" in tensors:
                note = Note(layer, tensors, settings)
                result |= self._noted(note)
                mark = replace(note.entry, dtype="U8", shape=(0,), nbytes=0)
                if note.setting("full_precision_matrix_mult", False):
                    result[f"{layer}.{FULL_PRODUCTS}"] = mark
                if note.setting("linear_dtype", "") == "int8":
                    result[f"{layer}.{EIGHT_BIT_OPERANDS}"] = mark
        dtypes = {entry.dtype for entry in result.values()}
        for member in self.members:
            member.require_packages(dtypes, path)
        return result

    def _noted(self, note: Note) -> Tensors:
        kind = note.kind
        for member in self.members:
            if kind in member.notes:
                described = member.noted(note)
                if described is not None:
                    return described
        known = dict.fromkeys(kind for member in self.members for kind in member.notes)
        raise WrongModel(
            "{where} is stored in ComfyUI's {kind!r:.99}, which is not supported. Use a file in bf16, fp8 or int8 "
            "(ComfyUI formats that are read: {known}).",
            code="comfy_quant.unsupported",
            where=note.where,
            kind=kind,
            known=list(known),
        )


def _notes(tensors: Tensors, metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """By layer; the header's count where both are there."""
    beside = read_notes({name: entry for name, entry in tensors.items() if name.endswith(_NOTE)})
    notes: dict[str, Any] = {name.removesuffix(_NOTE): note for name, note in beside.items()}
    if _HEADER in metadata:
        layers = parse_json(metadata[_HEADER], f"{path}: {_HEADER!r}").get("layers")
        if not isinstance(layers, dict) or not all(isinstance(note, dict) for note in layers.values()):
            raise DamagedFile(
                "{file}: {key!r} has no 'layers' table. Download it again.",
                code="comfy_quant.no_layers",
                file=path,
                key=_HEADER,
            )
        prefix = _PREFIX if any(name.startswith(_PREFIX) for name in tensors) else ""
        notes |= {prefix + layer.removeprefix(prefix): note for layer, note in layers.items()}
    return notes
