"""int8 weights with one fp32 number per output row. Weights only: what they are multiplied with stays as it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.checkpoint import TensorEntry
from .chunks import row_chunks
from .comfy_notes import Note, NotedFormat
from .file_parts import Part, name_beside
from .format import Format, Layout, StoredParam, Tensors
from .neighbours import is_scale, only_scale
from .scaling import scale_rows_into, scaled_rows_bytes
from .scratch import Scratch, padded

LARGEST = 127


@dataclass(frozen=True)
class Int8Codec:
    """Two parts: int8 data (N, K), and N numbers; weight = data * number * factor."""

    name: str
    factor: float = 1.0

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        data = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        amax = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
        for rows in row_chunks(weight):
            chunk = weight[rows].float()
            largest = chunk.abs().amax(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
            amax[rows] = largest
            data[rows] = (chunk * (LARGEST / largest)).round_().clamp_(-LARGEST, LARGEST)
            del chunk  # before the next one is made
        return data, amax / (LARGEST * self.factor)

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        data, numbers = parts[0], parts[1].reshape(-1, 1)
        with scratch.lent():
            if numbers.dtype is not torch.float32:
                numbers = scratch.take(*numbers.shape).copy_(numbers)
            if self.factor != 1:
                numbers = torch.mul(numbers, self.factor, out=scratch.take(*numbers.shape))
            scale_rows_into(out, data, numbers, scratch)

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        return 2 * padded(4 * shape[0]) + scaled_rows_bytes(shape, on_host=on_host)


@dataclass(frozen=True)
class BnbInt8Codec(Int8Codec):
    """LLM.int8() keeps each row's largest absolute value (SCB): weight = data * SCB / 127."""

    name: str = "bnb_int8"
    factor: float = 1 / LARGEST

    def file_parts(self, name: str, shape: tuple[int, ...], source: str) -> tuple[Part, ...]:
        """As bitsandbytes has it."""
        return Part(name, "I8", shape), Part(name_beside(name, "SCB"), "F32", shape[:1])


INT8, BNB_INT8 = Int8Codec("int8"), BnbInt8Codec()
# ComfyUI's is told by its notes, which give it this dtype
_DTYPE = INT8.name.upper()


class Int8(NotedFormat):
    """ComfyUI's int8 where it is not rotated."""

    dtypes = (_DTYPE,)
    codecs = (INT8,)
    encoders = (INT8,)
    notes = ("int8_tensorwise",)

    def noted(self, note: Note) -> Tensors | None:
        note.require_scaled("I8")
        return note.weight_as(_DTYPE) if note.rotation() is None else None

    def recognise(self, name: str, tensors: Tensors) -> StoredParam | None:
        data = tensors[name]
        scale = only_scale(name, tensors)
        return None if scale is None else StoredParam(name, data.shape, INT8, (data, scale))

    def raw_layout(self, part: TensorEntry) -> Layout:
        return torch.int8, part.shape


class BnbInt8(Format):
    """bitsandbytes' int8, told by the row maxima beside it (SCB)."""

    dtypes = ("I8",)
    codecs = (BNB_INT8,)

    def recognise(self, name: str, tensors: Tensors) -> StoredParam | None:
        data = tensors[name]
        row_maxima = tensors.get(f"{name.removesuffix('.weight')}.SCB") if name.endswith(".weight") else None
        if row_maxima is None or not is_scale(row_maxima, data) or row_maxima.shape != data.shape[:1]:
            return None
        return StoredParam(name, data.shape, BNB_INT8, (data, row_maxima))
