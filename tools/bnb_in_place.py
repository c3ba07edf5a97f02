"""bitsandbytes' operators that write in place, which it has on a GPU alone, on the CPU too: for a GPU's way there."""

import torch
from bitsandbytes import functional  # noqa: F401  # registers the operators
from torch import Tensor

_FOUR_BITS, _BY_BLOCKS = "bitsandbytes::dequantize_4bit.out", "bitsandbytes::dequantize_blockwise.out"


@torch.library.impl(_FOUR_BITS, "CPU")
def _dequantize_4bit(
    packed: Tensor, absmax: Tensor, blocksize: int, kind: str, shape: list[int], dtype: torch.dtype, out: Tensor
) -> None:
    out.copy_(torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, blocksize, kind, shape, dtype).view(out.shape))


@torch.library.impl(_BY_BLOCKS, "CPU")
def _dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    out.copy_(torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, code, blocksize, dtype))
