"""Weights stored as they are, in one floating dtype: bf16, fp16, fp32 and unscaled fp8."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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

    def decode_into(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        out.copy_(parts[0])

    def scratch_bytes(self, shape: Sequence[int]) -> int:
        return 0


PLAIN = (
    PlainCodec("bf16", torch.bfloat16),
    PlainCodec("fp16", torch.float16),
    PlainCodec("fp32", torch.float32),
    PlainCodec("fp8_e4m3fn", torch.float8_e4m3fn),
    PlainCodec("fp8_e5m2", torch.float8_e5m2),
)
