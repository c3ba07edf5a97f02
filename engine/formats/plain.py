"""Weights stored as they are, in one floating dtype: bf16, fp16, fp32 and unscaled fp8."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.checkpoint import TensorEntry
from .format import Format, Layout, StoredParam, Tensors
from .neighbours import stands_alone
from .scratch import Scratch

# safetensors' dtype names -> torch
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class PlainCodec:
    """One part: the weight itself. Decoding is a cast (exact wherever the compute dtype is at least as wide)."""

    name: str
    dtype: torch.dtype

    def encode(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (weight.to(self.dtype),)

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        out.copy_(parts[0])

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        return 0


PLAIN = (
    PlainCodec("bf16", torch.bfloat16),
    PlainCodec("fp16", torch.float16),
    PlainCodec("fp32", torch.float32),
    PlainCodec("fp8_e4m3fn", torch.float8_e4m3fn),
    PlainCodec("fp8_e5m2", torch.float8_e5m2),
)
_OF_DTYPE = dict(zip(("BF16", "F16", "F32", "F8_E4M3", "F8_E5M2"), PLAIN, strict=True))


class Plain(Format):
    """A weight that is all that its layer says of it. Of any dtype that torch has, its layout."""

    dtypes = TORCH_DTYPES.keys()
    codecs = PLAIN
    encoders = PLAIN
    fp8_dtypes = frozenset({"F8_E4M3", "F8_E5M2"})

    def recognise(self, name: str, tensors: Tensors) -> StoredParam | None:
        data = tensors[name]
        codec = _OF_DTYPE.get(data.dtype)
        if codec is None or not stands_alone(name, tensors):
            return None
        return StoredParam(name, data.shape, codec, (data,))

    def raw_layout(self, part: TensorEntry) -> Layout:
        return TORCH_DTYPES[part.dtype], part.shape
