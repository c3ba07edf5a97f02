"""nf4 and fp4 as bitsandbytes stores them, through its operators on plain tensors. Never through its modules."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..packages import bitsandbytes
from .chunks import CHUNK_WEIGHTS

BLOCK = 64  # weights that share a scale (absmax)
NESTED_BLOCK = 256  # scales that share a scale, where scales are quantized too


@dataclass(frozen=True)
class Bnb4Codec:
    """Two parts: 4-bit codes, two to a byte, and an fp32 absmax per 64 weights. Doubly quantized five: codes, uint8
    absmax, fp32 absmax per 256 of those, their code of 256 numbers, and an offset.

    Bit-equal to bitsandbytes' own dequantization to the compute dtype; in chunks, so that scratch memory stays small.
    """

    name: str

    def encode(self, weight: Tensor, *, double: bool = False) -> tuple[Tensor, ...]:
        flat = weight.contiguous().view(-1)
        packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
        absmax = torch.empty(-(-flat.numel() // BLOCK), dtype=torch.float32, device=flat.device)
        for start in range(0, flat.numel(), CHUNK_WEIGHTS):
            chunk = flat[start : start + CHUNK_WEIGHTS]
            codes, largest = load_operators().quantize_4bit(chunk, BLOCK, self.name, torch.uint8)
            packed[start // 2 :][: codes.numel()] = codes.view(-1)
            absmax[start // BLOCK :][: largest.numel()] = largest
        if not double:
            return packed, absmax
        code = _dynamic_code().to(weight.device)
        offset = absmax.mean()
        scales, nested = load_operators().quantize_blockwise(absmax - offset, code, NESTED_BLOCK)
        return packed, scales, nested, code, offset

    def decode_into(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        packed, absmax, *nested = parts
        flat = out.view(-1)
        for start in range(0, flat.numel(), CHUNK_WEIGHTS):
            chunk = flat[start : start + CHUNK_WEIGHTS]
            count, first = chunk.numel(), start // BLOCK
            scales = absmax[first : first + -(-count // BLOCK)]
            if nested:
                scales = _scales(scales, first // NESTED_BLOCK, *nested)
            codes = packed[start // 2 : start // 2 + (count + 1) // 2]
            shape = [count // BLOCK, BLOCK] if count % BLOCK == 0 else [count]
            # without a name, so that it is gone before the next chunk
            chunk.copy_(load_operators().dequantize_4bit(codes, scales, BLOCK, self.name, shape, out.dtype).view(-1))

    @property
    def code(self) -> Tensor:
        """The 16 numbers that the codes stand for, fp32, as bitsandbytes writes them beside its weights."""
        return _four_bit_code(self.name)

    def scratch_bytes(self, shape: Sequence[int]) -> int:
        return min(prod(shape), CHUNK_WEIGHTS) * 5  # a chunk in fp32 at the most, and its scales


def _scales(codes: Tensor, first: int, nested: Tensor, code: Tensor, offset: Tensor) -> Tensor:
    """The scales that `codes` store in uint8; `first` is the nested block that they begin with."""
    absmax = nested[first : first + -(-len(codes) // NESTED_BLOCK)]
    return load_operators().dequantize_blockwise(codes, absmax, code, NESTED_BLOCK, torch.float32).add_(offset)


@cache
def load_operators() -> Any:
    """bitsandbytes' operators. Raises MissingPackage."""
    bitsandbytes()
    return torch.ops.bitsandbytes


@cache
def _dynamic_code() -> Tensor:
    code: Tensor = bitsandbytes().create_dynamic_map()
    return code


@cache
def _four_bit_code(name: str) -> Tensor:
    code: Tensor = bitsandbytes().get_4bit_type(name, device="cpu")
    return code


NF4, FP4 = Bnb4Codec("nf4"), Bnb4Codec("fp4")
