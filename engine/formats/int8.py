"""int8 weights with one fp32 number per output row. Weights only: what they are multiplied with stays as it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import row_chunks

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

    def decode_into(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        data, numbers = parts
        # every int8 value is exact in bf16 and fp16; the product is rounded once, without an fp32 copy of the weight
        out.copy_(data)
        out.mul_(numbers.float().reshape(-1, 1) * self.factor)

    def scratch_bytes(self, shape: Sequence[int]) -> int:
        return 8 * shape[0]  # the numbers in fp32, and times the factor


INT8 = Int8Codec("int8")
# LLM.int8() keeps each row's largest absolute value (SCB): weight = data * SCB / 127
BNB_INT8 = Int8Codec("bnb_int8", factor=1 / LARGEST)
