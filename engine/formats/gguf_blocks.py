"""What the bytes of one ggml block mean: a table from type to a function (n, block bytes) uint8 -> (n, weights) fp32.

A result may have more dimensions than two, if its weights stand in their order.

Every function computes what llama.cpp's reference does, in its order of roundings
(https://github.com/ggml-org/llama.cpp, ggml/src/ggml-quants.c and gguf-py/gguf/quants.py): a block holds a scale or
two in fp16, packed integers, and for the K types 6- or 4-bit scales of 16 or 32 weights each. No loop over blocks; at
most 6 bytes of memory per weight.
"""

import struct
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def q8_0(blocks: Tensor) -> Tensor:
    return _integers(blocks[:, 2:]).mul_(half(blocks, 0))


def q4_0(blocks: Tensor) -> Tensor:
    return _integers(unpack(blocks[:, None, 2:], 4).sub_(8)).mul_(half(blocks, 0))


def q4_1(blocks: Tensor) -> Tensor:
    return unpack(blocks[:, None, 4:], 4).float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def q5_0(blocks: Tensor) -> Tensor:
    q = _with_high_bits(blocks[:, None, 6:], 4, blocks[:, 2:6, None], 1)
    return _integers(q.sub_(16)).mul_(half(blocks, 0))


def q5_1(blocks: Tensor) -> Tensor:
    q = _with_high_bits(blocks[:, None, 8:], 4, blocks[:, 4:8, None], 1)
    return q.float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def q2_k(blocks: Tensor) -> Tensor:
    packed = blocks[:, :16]  # low 4 bits: scale, high 4 bits: minimum, of 16 weights each
    scale = (packed & 15).float().mul_(half(blocks, 80))
    minimum = (packed >> 4).float().mul_(half(blocks, 82))
    return scaled(unpack(blocks[:, 16:80].unflatten(1, (2, 32)), 2).float(), scale, minimum)


def q3_k(blocks: Tensor) -> Tensor:
    packed = blocks[:, 96:108]
    six_bits = _with_high_bits(packed[:, None, :8], 4, packed[:, None, 8:], 2)
    scale = _integers(six_bits.sub_(32)).mul_(half(blocks, 108))
    q = unpack(blocks[:, :32].unsqueeze(1), 1).bitwise_xor_(1).mul_(4)  # a bit that is not set takes 4 off
    q = unpack(blocks[:, 32:96].unflatten(1, (2, 32)), 2).sub_(q)
    return scaled(_integers(q), scale)


def q4_k(blocks: Tensor) -> Tensor:
    scale, minimum = _scales_and_minima(blocks)
    return scaled(unpack(blocks[:, 16:].unflatten(1, (4, 32)), 4).float(), scale, minimum)


def q5_k(blocks: Tensor) -> Tensor:
    scale, minimum = _scales_and_minima(blocks)
    q = _with_high_bits(blocks[:, 48:].unflatten(1, (4, 32)), 4, blocks[:, None, 16:48], 1)
    return scaled(q.float(), scale, minimum)


def q6_k(blocks: Tensor) -> Tensor:
    q = _with_high_bits(blocks[:, :128].unflatten(1, (2, 64)), 4, blocks[:, 128:192].unflatten(1, (2, 32)), 2)
    scale = _integers(blocks[:, 192:208]).mul_(half(blocks, 208))
    return scaled(_integers(q.sub_(32)), scale)


def iq4_nl(blocks: Tensor) -> Tensor:
    return _looked_up(blocks[:, 2:], _NONLINEAR).mul_(half(blocks, 0).unsqueeze(2)).transpose(1, 2)


def iq4_xs(blocks: Tensor) -> Tensor:
    weights = _looked_up(blocks[:, 8:], _NONLINEAR).unflatten(
        1, (8, 16)
    )  # before the scales: this is where it takes most
    low = unpack(blocks[:, 4:8].unsqueeze(2), 4)  # of two neighbours' scales, the first one's bits are the lower ones
    high = unpack(blocks[:, 2:4].unsqueeze(2), 2)
    scale = _integers(low.bitwise_or_(high.bitwise_left_shift_(4)).sub_(32)).mul_(half(blocks, 0))
    return weights.mul_(scale[:, :, None, None]).transpose(2, 3)


def mxfp4(blocks: Tensor) -> Tensor:
    """Of OCP's Microscaling Formats 1.0: 4-bit floating point, doubled here, so that the scale is half its power."""
    weights = _looked_up(blocks[:, 1:], _E2M1_DOUBLED)  # before the scales: this is where it takes most
    exponent = blocks[:, :1].int()
    small = torch.bitwise_left_shift(torch.full_like(exponent, 1 << 21), exponent.clamp(max=1))  # subnormal in fp32
    bits = torch.where(exponent < 2, small, (exponent - 1).bitwise_left_shift_(23))
    return weights.mul_(bits.view(torch.float32).unsqueeze(2)).transpose(1, 2)


def tq1_0(blocks: Tensor) -> Tensor:
    """Five weights to a byte, four to the last four: multiplied by a power of three, its highest digit is the weight's
    (a byte holds 256/243 of the number in base three)."""
    powers = torch.ones(5, dtype=torch.uint8, device=blocks.device)
    for digit in range(1, 5):
        powers[digit:] *= 3
    runs = ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
    q = torch.cat([(run.unsqueeze(1) * powers[:count, None]).flatten(1) for run, count in runs], dim=1)
    q = q.short().mul_(3).bitwise_right_shift_(8).sub_(1).to(torch.int8)
    return q.float().mul_(half(blocks, 52))


def tq2_0(blocks: Tensor) -> Tensor:
    return _integers(unpack(blocks[:, :64].unflatten(1, (2, 32)), 2).sub_(1)).mul_(half(blocks, 64))


DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
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
# the most that a function allocates, its result included, in bytes per weight
SCRATCH_PER_WEIGHT = 6
# and whatever the number of weights: the table
TABLE_BYTES: Mapping[str, int] = dict.fromkeys(("IQ4_NL", "IQ4_XS", "MXFP4"), 4096)


def half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of each block, (n, 1) fp32."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _integers(raw: Tensor) -> Tensor:
    """uint8 read as int8 (so that subtracting may wrap), in fp32."""
    return raw.view(torch.int8).float()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """(n, groups, width) uint8 -> (n, weights) uint8: in each group all lowest bits first, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(-1, 1)
    return (packed.unsqueeze(-2) >> shifts).bitwise_and_(2**bits - 1).flatten(1)


def _with_high_bits(low: Tensor, low_bits: int, high: Tensor, high_bits: int) -> Tensor:
    return unpack(low, low_bits).bitwise_or_(unpack(high, high_bits).bitwise_left_shift_(low_bits))


def _looked_up(packed: Tensor, table: tuple[int, int]) -> Tensor:
    """(n, bytes) uint8 -> (n, bytes, 2) fp32: what the 4 lower and the 4 higher bits of each stand for."""
    numbers = torch.full((2,), table[0], dtype=torch.int64, device=packed.device)
    numbers[1:].fill_(table[1])  # filled in: a list would be copied from the host, which waits
    sixteen = numbers.view(torch.int8).float()
    of_byte = torch.stack([sixteen.repeat(16), sixteen.repeat_interleave(16)], dim=1)
    return of_byte.index_select(0, packed.flatten().int()).unflatten(0, packed.shape)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: (n, 8) each, from 6 bits each in bytes 4 to 16."""
    first, second, shared = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([first & 63, (shared & 15) | ((first >> 2) & 48)], dim=1)
    minimum = torch.cat([second & 63, (shared >> 4) | ((second >> 2) & 48)], dim=1)
    return scale.float().mul_(half(blocks, 0)), minimum.float().mul_(half(blocks, 2))


def scaled(q: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """q * scale - minimum, with one scale for each group of neighbours."""
    groups = q.unflatten(1, (scale.shape[1], -1)).mul_(scale.unsqueeze(2))
    return (groups if minimum is None else groups.sub_(minimum.unsqueeze(2))).flatten(1)
