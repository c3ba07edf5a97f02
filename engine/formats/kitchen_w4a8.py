"""ComfyUI's asym_w4a8_int8: 4-bit codes of a codebook, rotated, with scales by group and row; through comfy-kitchen.

"w4a8" names how ComfyUI multiplies with it; here what is multiplied with the weight is not quantized.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WrongModel
from ..files.checkpoint import TensorEntry
from .byte_tables import look_up_into, take_table
from .chunks import chunk_rows
from .comfy_notes import GROUPS, Note, NotedFormat, require_comfy_kitchen
from .format import Layout, StoredParam, Tensors
from .int8 import LARGEST
from .rotation import hadamard_bytes, take_hadamard, unrotate
from .scaling import scale_into
from .scratch import Scratch

# what the parts behind the data are called beside `<layer>.`; a file without a codebook has evenly spaced numbers
W4A8_PARTS = ("weight_s_rel", "weight_s_channel", "weight_codebook")


@dataclass(frozen=True)
class W4a8Codec:
    """Three or four parts: codes (N, K / 2), scales by group (N, K / group size) in fp8 or fp32 and by row (N,), and
    the codebook's 16 numbers. `group`: neighbours of a row that were rotated together.

    Bit-equal to comfy-kitchen's own dequantization for any device to the compute dtype: the same operators in the same
    order (backends/eager/w4a8_int8.py), in chunks of rows.
    """

    group: int

    @property
    def name(self) -> str:
        return f"asym_w4a8_int8_{self.group}"

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        data, by_group, by_row, *codebook = parts
        step = self._rows(out.shape, on_host=scratch.on_host)
        with scratch.lent():
            hadamard = take_hadamard(self.group, out.dtype, scratch)
            of_byte = _take_table(codebook[0] if codebook else None, scratch)
            for start in range(0, len(out), step):
                rows = slice(start, start + step)
                with scratch.lent():
                    rotated = scratch.take(*out[rows].shape, dtype=out.dtype)
                    _decode_rotated(rotated, data[rows], by_group[rows], by_row.view(-1, 1)[rows], of_byte, scratch)
                    unrotate(out[rows], rotated, hadamard)

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        return self._rows(shape, on_host=on_host) * shape[1] * _BYTES_PER_WEIGHT + self._constant_bytes

    @property
    def _constant_bytes(self) -> int:
        return hadamard_bytes(self.group) + 4096

    def _rows(self, shape: Sequence[int], *, on_host: bool) -> int:
        return chunk_rows(shape, shape[1] * _BYTES_PER_WEIGHT, on_host=on_host, kept=self._constant_bytes)


def _take_table(codebook: Tensor | None, scratch: Scratch) -> Tensor:
    """Of bytes, fp32; without a codebook the numbers are evenly spaced."""
    return take_table(torch.arange(-8, 8, out=scratch.take(16)) if codebook is None else codebook, scratch)


def _decode_rotated(
    out: Tensor, data: Tensor, by_group: Tensor, by_row: Tensor, of_byte: Tensor, scratch: Scratch
) -> None:
    """Rows as they were rotated: each code's number times its group's scale is rounded to eight bits, as ComfyUI
    multiplies with it; then it is scaled by its row."""
    eight_bits = scratch.take(*out.shape, dtype=torch.int8)
    with scratch.lent():
        numbers = look_up_into(scratch.take(*out.shape), data.view(torch.uint8), of_byte, scratch)
        scale = scratch.take(*by_group.shape).copy_(by_group)
        in_groups = numbers.view(*by_group.shape, -1).mul_(scale.unsqueeze(2))
        eight_bits.copy_(in_groups.round_().clamp_(-LARGEST, LARGEST).view(out.shape))
    scale_into(out, eight_bits, by_row, scratch)


def load_w4a8() -> Any:
    """comfy-kitchen's dequantization. Raises ImportError or AttributeError where it is missing or too old."""
    import comfy_kitchen

    return comfy_kitchen.dequantize_w4a8_int8_weight


W4A8: Mapping[str, W4a8Codec] = {f"ASYM_W4A8_INT8_{group}": W4a8Codec(group) for group in GROUPS}
# of scratch: rotated in the compute dtype, in eight bits, as numbers in fp32, and the codes' indices
_BYTES_PER_WEIGHT = 11
_NAME = "asym_w4a8_int8"
_SCALE_GROUP = 16  # weights that share a scale, where its note names none


class W4a8(NotedFormat):
    """asym_w4a8_int8."""

    dtypes = W4A8.keys()
    codecs = tuple(W4A8.values())
    notes = (_NAME,)

    def noted(self, note: Note) -> Tensors:
        entry, by_group = note.entry, note.part(W4A8_PARTS[0])
        rotation = note.group()
        if note.part("weight_correction") is not None:
            raise WrongModel(
                "{where} has a weight_correction, which neither ComfyUI nor this pack reads. Use a {kind} file "
                "without one, or a file in bf16, fp8 or int8.",
                code="comfy_quant.weight_correction",
                where=note.where,
                kind=_NAME,
            )
        size = note.setting("group_size", _SCALE_GROUP)
        groups = by_group.shape[-1] if by_group is not None and len(by_group.shape) == 2 else 0
        rows, columns = entry.shape[0] if entry.shape else 0, groups * size if type(size) is int else 0
        if len(entry.shape) == 2 and columns and entry.shape == (rows, columns * 3 // 4):
            raise WrongModel(
                "{where} is {kind} with 6-bit codes, which are not supported. Use a file with 4-bit codes.",
                code="comfy_quant.codes_of_6_bits",
                where=note.where,
                kind=_NAME,
            )
        if by_group is None or not _fits(note, rows, columns, groups):
            raise note.broken()
        note.require_rotated(rotation, (rows, columns))
        result = dict(note.weight_as(f"{_NAME.upper()}_{rotation}", (rows, columns)))
        if by_group.dtype == "U8":  # fp8 as bytes
            result[f"{note.layer}.{W4A8_PARTS[0]}"] = replace(by_group, dtype="F8_E4M3")
        return result

    def require_packages(self, dtypes: Collection[str], path: Path) -> None:
        if not W4A8.keys().isdisjoint(dtypes):
            require_comfy_kitchen(path, f"weights in {_NAME}", "0.2.27", load_w4a8)

    def recognise(self, name: str, tensors: Tensors) -> StoredParam:
        data = tensors[name]
        layer = name.removesuffix(".weight")
        found = (tensors.get(f"{layer}.{part}") for part in W4A8_PARTS)
        return StoredParam(name, data.shape, W4A8[data.dtype], (data, *(part for part in found if part)))

    def raw_layout(self, part: TensorEntry) -> Layout:
        return torch.int8, (part.shape[0], part.shape[1] // 2)


def _fits(note: Note, rows: int, columns: int, groups: int) -> bool:
    """Whether the parts of a weight of that size are what its note promises."""
    by_group, by_row, codebook = (note.part(part) for part in W4A8_PARTS)
    return (
        rows > 0
        and columns > 0
        and note.entry.dtype in ("I8", "U8")
        and note.entry.shape == (rows, columns // 2)
        and by_group is not None
        and by_group.dtype in ("F8_E4M3", "U8", "F32")
        and by_group.shape == (rows, groups)
        and by_row is not None
        and (by_row.dtype, prod(by_row.shape)) == ("F32", rows)
        and (codebook is None or (codebook.dtype, codebook.shape) == ("F32", (16,)))
    )
