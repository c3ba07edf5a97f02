"""What the bytes of one ggml block mean: a table from type to a function (n, block bytes) uint8 -> Scaled.

Every function computes what llama.cpp's reference does, in its order of roundings
(https://github.com/ggml-org/llama.cpp, ggml/src/ggml-quants.c and gguf-py/gguf/quants.py): a block holds a scale or
two in fp16, packed integers, and for the K types 6- or 4-bit scales of 16 or 32 weights each. No loop over blocks; all
that is made lies in the scratch memory that is handed in.
"""

import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .scaling import scaled
from .scratch import Scratch


class Scaled(NamedTuple):
    """Weights as codes * scale + sign * offset: scale and offset fp32, broadcast over the codes, which stand in the
    order of the weights."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None
    sign: int = 1


def q8_0(blocks: Tensor, scratch: Scratch) -> Scaled:
    return Scaled(blocks[:, 2:].view(torch.int8), half(blocks, 0, scratch))


def q4_0(blocks: Tensor, scratch: Scratch) -> Scaled:
    codes = unpack(blocks[:, None, 2:], 4, scratch).sub_(8)
    return Scaled(signed(codes).flatten(1), half(blocks, 0, scratch))


def q4_1(blocks: Tensor, scratch: Scratch) -> Scaled:
    scale, minimum = two_halves(blocks, 0, scratch)
    return Scaled(unpack(blocks[:, None, 4:], 4, scratch).flatten(1), scale, minimum)


def q5_0(blocks: Tensor, scratch: Scratch) -> Scaled:
    codes = _with_high_bits(blocks[:, None, 6:], 4, blocks[:, 2:6, None], 1, scratch)
    return Scaled(signed(codes.sub_(16)), half(blocks, 0, scratch))


def q5_1(blocks: Tensor, scratch: Scratch) -> Scaled:
    scale, minimum = two_halves(blocks, 0, scratch)
    return Scaled(_with_high_bits(blocks[:, None, 8:], 4, blocks[:, 4:8, None], 1, scratch), scale, minimum)


def q2_k(blocks: Tensor, scratch: Scratch) -> Scaled:
    both = scratch.take(2, len(blocks), 16)
    with scratch.lent():
        nibbles = unpack(blocks[:, None, :16], 4, scratch).squeeze(1)  # low: scale, high: minimum, of 16 weights each
        scaled(nibbles, _halves(blocks, 80, scratch).unsqueeze(2), scratch, out=both.transpose(0, 1))
    codes = unpack(blocks[:, 16:80].unflatten(1, (2, 32)), 2, scratch)
    return _with_minima(codes.view(len(blocks), 16, 16), both)


def q3_k(blocks: Tensor, scratch: Scratch) -> Scaled:
    scale = scratch.take(len(blocks), 16)
    with scratch.lent():
        six_bits = _with_high_bits(blocks[:, None, 96:104], 4, blocks[:, None, 104:108], 2, scratch)
        scaled(signed(six_bits.sub_(32)), half(blocks, 108, scratch), scratch, out=scale)
    codes = _with_high_bits(blocks[:, 32:96].unflatten(1, (2, 32)), 2, blocks[:, None, :32], 1, scratch)
    # a bit that is not set takes 4 off
    return Scaled(signed(codes.sub_(4)).view(len(blocks), 16, 16), scale.unsqueeze(2))


def q4_k(blocks: Tensor, scratch: Scratch) -> Scaled:
    both = _scales_and_minima(blocks, scratch)
    codes = unpack(blocks[:, 16:].unflatten(1, (4, 32)), 4, scratch)
    return _with_minima(codes.view(len(blocks), 8, 32), both)


def q5_k(blocks: Tensor, scratch: Scratch) -> Scaled:
    both = _scales_and_minima(blocks, scratch)
    codes = _with_high_bits(blocks[:, 48:].unflatten(1, (4, 32)), 4, blocks[:, None, 16:48], 1, scratch)
    return _with_minima(codes.view(len(blocks), 8, 32), both)


def q6_k(blocks: Tensor, scratch: Scratch) -> Scaled:
    scale = scratch.take(len(blocks), 16)
    with scratch.lent():
        scaled(signed(blocks[:, 192:208]), half(blocks, 208, scratch), scratch, out=scale)
    high = blocks[:, 128:192].unflatten(1, (2, 32))
    codes = _with_high_bits(blocks[:, :128].unflatten(1, (2, 64)), 4, high, 2, scratch).sub_(32)
    return Scaled(signed(codes).view(len(blocks), 16, 16), scale.unsqueeze(2))


def iq4_nl(blocks: Tensor, scratch: Scratch) -> Scaled:
    codes = _looked_up(blocks[:, 2:], _NONLINEAR, scratch)
    return Scaled(codes.transpose(1, 2), half(blocks, 0, scratch).unsqueeze(2))


def iq4_xs(blocks: Tensor, scratch: Scratch) -> Scaled:
    scale = scratch.take(len(blocks), 8)
    with scratch.lent():
        # of two neighbours' scales, the first one's bits are the lower ones
        six_bits = _with_high_bits(blocks[:, 4:8, None], 4, blocks[:, 2:4, None], 2, scratch)
        scaled(signed(six_bits.sub_(32)), half(blocks, 0, scratch), scratch, out=scale)
    codes = _looked_up(blocks[:, 8:], _NONLINEAR, scratch).unflatten(1, (8, 16))
    return Scaled(codes.transpose(2, 3), scale[:, :, None, None])


def mxfp4(blocks: Tensor, scratch: Scratch) -> Scaled:
    """Of OCP's Microscaling Formats 1.0: 4-bit floating point, doubled here, so that the scale is half its power."""
    exponent = scratch.take(len(blocks), 1, dtype=torch.int32).copy_(blocks[:, :1])
    # of the two smallest exponents the power is subnormal in fp32; of all others its bits are larger than theirs
    bits = torch.clamp(exponent, max=1, out=scratch.take(len(blocks), 1, dtype=torch.int32)).add_(1).mul_(1 << 21)
    torch.maximum(bits, exponent.sub_(1).bitwise_left_shift_(23), out=bits)
    codes = _looked_up(blocks[:, 1:], _E2M1_DOUBLED, scratch)
    return Scaled(codes.transpose(1, 2), bits.view(torch.float32).unsqueeze(2))


def tq1_0(blocks: Tensor, scratch: Scratch) -> Scaled:
    """Five weights to a byte, four to the last four: multiplied by a power of three, its highest digit is the weight's
    (a byte holds 256/243 of the number in base three)."""
    count = len(blocks)
    codes = scratch.take(count, 256, dtype=torch.int16)
    with scratch.lent():
        powers, digits = scratch.take(5, 1, dtype=torch.uint8).fill_(1), scratch.take(count, 256, dtype=torch.uint8)
        for digit in range(1, 5):
            powers[digit:].mul_(3)
        for packed, done, many in ((blocks[:, :32], 0, 5), (blocks[:, 32:48], 160, 5), (blocks[:, 48:52], 240, 4)):
            run = digits[:, done : done + many * packed.shape[1]].view(count, many, -1)
            torch.mul(packed.unsqueeze(1), powers[:many], out=run)
        codes.copy_(digits).mul_(3).bitwise_right_shift_(8).sub_(1)
    return Scaled(codes, half(blocks, 52, scratch))


def tq2_0(blocks: Tensor, scratch: Scratch) -> Scaled:
    codes = unpack(blocks[:, :64].unflatten(1, (2, 32)), 2, scratch).sub_(1)
    return Scaled(signed(codes).flatten(1), half(blocks, 64, scratch))


DECODERS: Mapping[str, Callable[[Tensor, Scratch], Scaled]] = {
    "Q8_0": q8_0, "Q6_K": q6_k, "Q5_K": q5_k, "Q5_1": q5_1, "Q5_0": q5_0, "Q4_K": q4_k, "Q4_1": q4_1, "Q4_0": q4_0,
    "Q3_K": q3_k, "Q2_K": q2_k, "IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs, "MXFP4": mxfp4,
    "TQ2_0": tq2_0, "TQ1_0": tq1_0,
}  # fmt: skip


def _sixteen(*numbers: int) -> tuple[int, int]:
    """What 4 bits stand for: numbers of one byte each, as two of eight."""
    first, second = struct.unpack("<2q", struct.pack("16b", *numbers))
    return first, second


# IQ4's, kvalues_iq4nl; and MXFP4's, kvalues_mxfp4
_NONLINEAR = _sixteen(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = _sixteen(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def half(blocks: Tensor, at: int, scratch: Scratch) -> Tensor:
    """The fp16 number at byte `at` of each block, (n, 1) fp32."""
    return scratch.take(len(blocks), 1).copy_(blocks[:, at : at + 2].view(torch.float16))


def _halves(blocks: Tensor, at: int, scratch: Scratch) -> Tensor:
    """The two from there on, (n, 2)."""
    return scratch.take(len(blocks), 2).copy_(blocks[:, at : at + 4].view(torch.float16))


def two_halves(blocks: Tensor, at: int, scratch: Scratch) -> tuple[Tensor, Tensor]:
    both = _halves(blocks, at, scratch)
    return both[:, :1], both[:, 1:]


def signed(raw: Tensor) -> Tensor:
    """uint8 read as int8, so that subtracting may wrap."""
    return raw.view(torch.int8)


def shifts(step: int, count: int, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """(count,): 0, step, 2 * step, ..."""
    return torch.arange(0, step * count, step, out=scratch.take(count, dtype=dtype))


def unpack(packed: Tensor, bits: int, scratch: Scratch) -> Tensor:
    """(n, groups, width) uint8 -> (n, groups, 8 / bits, width) uint8: in each group all lowest bits first, then the
    next."""
    n, groups, width = packed.shape
    codes = scratch.take(n, groups, 8 // bits, width, dtype=torch.uint8)
    if bits == 4:
        torch.bitwise_and(packed, 15, out=codes[:, :, 0])
        torch.bitwise_right_shift(packed, 4, out=codes[:, :, 1])
        return codes
    with scratch.lent():
        by = shifts(bits, 8 // bits, torch.uint8, scratch)
        torch.bitwise_right_shift(packed.unsqueeze(2), by.unsqueeze(1), out=codes)
    return codes.bitwise_and_(2**bits - 1)


def _with_high_bits(low: Tensor, low_bits: int, high: Tensor, high_bits: int, scratch: Scratch) -> Tensor:
    """(n, weights) uint8."""
    codes = unpack(low, low_bits, scratch).flatten(1)
    with scratch.lent():
        return codes.add_(unpack(high, high_bits, scratch).flatten(1), alpha=2**low_bits)


def _looked_up(packed: Tensor, table: tuple[int, int], scratch: Scratch) -> Tensor:
    """(n, bytes) uint8 -> (n, bytes, 2) int8: what the 4 lower and the 4 higher bits of each stand for."""
    codes = scratch.take(packed.numel(), 2, dtype=torch.int8)
    with scratch.lent():
        numbers = scratch.take(2, dtype=torch.int64).fill_(table[0])
        numbers[1:].fill_(table[1])  # filled in: a list would be copied from the host, which waits
        sixteen, of_byte = numbers.view(torch.int8), scratch.take(16, 16, 2, dtype=torch.int8)
        of_byte[:, :, 0].copy_(sixteen)
        of_byte[:, :, 1].copy_(sixteen.unsqueeze(1))
        index = scratch.take(*packed.shape, dtype=torch.int32).copy_(packed)
        torch.index_select(of_byte.view(256, 2), 0, index.view(-1), out=codes)
    return codes.view(*packed.shape, 2)


def _scales_and_minima(blocks: Tensor, scratch: Scratch) -> Tensor:
    """Of Q4_K and Q5_K: (2, n, 8), from 6 bits each in bytes 4 to 16."""
    both = scratch.take(2, len(blocks), 8)
    with scratch.lent():
        six_bits = scratch.take(len(blocks), 2, 8, dtype=torch.uint8)
        whole, shared, later = blocks[:, 4:12].unflatten(1, (2, 4)), blocks[:, 12:16], six_bits[:, :, 4:]
        torch.bitwise_and(whole, 63, out=six_bits[:, :, :4])
        torch.bitwise_and(shared, 15, out=later[:, 0])
        torch.bitwise_right_shift(shared, 4, out=later[:, 1])
        high = scratch.take(len(blocks), 2, 4, dtype=torch.uint8)
        later.add_(torch.bitwise_right_shift(whole, 6, out=high), alpha=16)
        scaled(six_bits, _halves(blocks, 0, scratch).unsqueeze(2), scratch, out=both.transpose(0, 1))
    return both


def _with_minima(codes: Tensor, both: Tensor) -> Scaled:
    """codes: (n, groups, weights); both: (2, n, groups), scales and what is taken off."""
    return Scaled(codes, both[0].unsqueeze(2), both[1].unsqueeze(2), -1)
