"""fp8 weights with an fp32 scale per tensor or per output row: weight = data * scale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .chunks import row_chunks
from .comfy_notes import Note, NotedFormat
from .file_parts import Part, name_beside
from .format import StoredParam, Tensors
from .neighbours import FULL_PRODUCTS, SCALE_NAMES, only_scale
from .scaling import scale_rows_into, scaled_rows_bytes
from .scratch import Scratch


@dataclass(frozen=True)
class ScaledFp8Codec:
    """Two parts: fp8 data (N, K), and a scale of one element or of N elements."""

    name: str
    dtype: torch.dtype

    def encode(self, weight: Tensor, *, per_row: bool = False) -> tuple[Tensor, Tensor]:
        largest = torch.finfo(self.dtype).max
        amax = torch.cat([weight[rows].abs().amax(dim=1, keepdim=True) for rows in row_chunks(weight)]).float()
        scale = ((amax if per_row else amax.max()) / largest).clamp_min(torch.finfo(torch.float32).tiny)
        data = torch.empty(weight.shape, dtype=self.dtype, device=weight.device)
        for rows in row_chunks(weight):
            data[rows] = (weight[rows].float() / (scale[rows] if per_row else scale)).to(self.dtype)
        return data, scale

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        data, scale = parts
        # (1, 1), not (): on a GPU a scale without dimensions would itself be rounded to the compute dtype first
        scale_rows_into(out, data, scale.reshape(-1, 1), scratch)

    def file_parts(self, name: str, shape: tuple[int, ...], source: str) -> tuple[Part, ...]:
        """As ComfyUI has it without a note."""
        dtype = "F8_E4M3" if self.dtype is torch.float8_e4m3fn else "F8_E5M2"
        return Part(name, dtype, shape), Part(name_beside(name, "scale_weight"), "F32", ())

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        return scaled_rows_bytes(shape, on_host=on_host)


SCALED_FP8 = (
    ScaledFp8Codec("fp8_e4m3fn_scaled", torch.float8_e4m3fn),
    ScaledFp8Codec("fp8_e5m2_scaled", torch.float8_e5m2),
)
_OF_DTYPE = dict(zip(("F8_E4M3", "F8_E5M2"), SCALED_FP8, strict=True))
_MARKER = "scaled_fp8"
_OF_NOTE = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


class ScaledFp8(NotedFormat):
    """fp8 beside its scale, with a note of ComfyUI's or without."""

    dtypes = _OF_DTYPE.keys()
    codecs = SCALED_FP8
    encoders = SCALED_FP8
    notes = tuple(_OF_NOTE)

    def noted(self, note: Note) -> Tensors:
        note.require_scaled(_OF_NOTE[note.kind])
        return {}

    def describe(self, tensors: Tensors, metadata: Mapping[str, str], path: Path) -> Tensors:
        """In files without notes, a marker of two numbers says that products are computed on decoded weights (ComfyUI's
        comfy/utils.py convert_old_quants)."""
        full = [name for name, entry in tensors.items() if name.endswith(_MARKER) and prod(entry.shape) == 2]
        scaled = [name for name in tensors if name.endswith(f".{SCALE_NAMES[0]}")] if full else []
        layers = [name.removesuffix(f".{SCALE_NAMES[0]}") for name in scaled]
        marks = {
            f"{layer}.{FULL_PRODUCTS}": replace(tensors[f"{layer}.weight"], dtype="U8", shape=(0,), nbytes=0)
            for layer in layers
            if f"{layer}.weight" in tensors
        }
        return {**tensors, **marks}

    def recognise(self, name: str, tensors: Tensors) -> StoredParam | None:
        data = tensors[name]
        scale = only_scale(name, tensors)
        return None if scale is None else StoredParam(name, data.shape, _OF_DTYPE[data.dtype], (data, scale))
