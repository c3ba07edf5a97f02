"""nunchaku's 4-bit formats as codecs: SVDQuant in int4 and fp4, and AWQ in the modulation. Never encodes.

A layer of SVDQuant computes (x / smooth) C^T + (x D^T) U^T + bias, with a matrix C of 4-bit codes and scales and two
thin ones of 16 bits (https://arxiv.org/abs/2411.05007; nunchaku, src/kernels/zgemm/gemm_w4a4_launch_impl.cuh). That is
one matrix, C / smooth + U D, and decodes to it: in fp32, rounded once to the compute dtype. What it is multiplied with
is not quantized here, as it is in nunchaku's kernels, so that results are the formula's and not the kernels'.

In int4 nunchaku adds SHIFT to what the MLP's second layer multiplies with C, because its kernels want no negative
numbers there; the bias in the file makes up for it. Here the bias takes it back: bias + SHIFT * (sums of C's rows).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import CHUNK_WEIGHTS, row_chunks
from .nunchaku_packing import (
    RANK_STEP,
    TILE_ROWS,
    unpack_awq,
    unpack_codes,
    unpack_down,
    unpack_micro_scales,
    unpack_scales,
    unpack_up,
)

SHIFT = 0.171875
MAX_RANK = 256
AWQ_GROUP = 64
# rows of modulation that belong to one dimension, in the file's order: shift, scale and gate of attention, of the MLP
AWQ_SPLITS = 6
_SCALES_OF_SPLITS = (1, 4)  # to which the file has added the one of 1 + scale
_SCRATCH_PER_WEIGHT = 7


@dataclass(frozen=True)
class SvdqCodec:
    """Parts: codes (N, K / 2) and scales (K / `group`, N) of C, smooth (K,), D (K, rank), U (N, rank); in fp4 also a
    scale for each row (N,) and one for all. All as nunchaku packs them; N and K are multiples of 128."""

    kind: str
    group: int
    rank: int

    @property
    def name(self) -> str:
        return f"svdq_{self.kind}_r{self.rank}"

    def decode_into(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        packed, packed_scales, smooth, down, up, *others = parts
        columns = out.shape[1]
        low_rank = unpack_down(down).float()
        divisor = unpack_scales(smooth).float().view(1, -1)
        table = _table(self.kind, out.device)
        for start in range(0, len(out), self._rows(out.shape)):
            rows = slice(start, min(len(out), start + self._rows(out.shape)))
            count = rows.stop - start
            of_rows = packed_scales.view(-1)[start * columns // self.group : rows.stop * columns // self.group]
            scales = self._scales(of_rows.view(-1, count))
            if others:
                by_row, whole = others
                scales = scales * unpack_scales(by_row[rows]).float() * whole.float()
            codes = unpack_codes(packed[rows])
            weight = table.index_select(0, codes.view(-1).int()).view(count, columns)
            del codes
            weight.view(count, -1, self.group).mul_(scales.unsqueeze(2))
            weight.div_(divisor).addmm_(unpack_up(up[rows]).float(), low_rank)
            out[rows].copy_(weight)
            del weight  # before the next one is made

    def _scales(self, packed: Tensor) -> Tensor:
        return (unpack_micro_scales(packed) if self.kind == "fp4" else unpack_scales(packed)).float()

    def scratch_bytes(self, shape: Sequence[int]) -> int:
        rows, columns = self._rows(shape), shape[1]
        weights = rows * columns * _SCRATCH_PER_WEIGHT + rows * columns // self.group * 12
        return weights + (columns + rows) * self.rank * 6 + columns * 8 + 8192

    @staticmethod
    def _rows(shape: Sequence[int]) -> int:
        """Rows of a chunk: whole tiles."""
        return min(shape[0], max(1, CHUNK_WEIGHTS // (shape[1] * TILE_ROWS)) * TILE_ROWS)


@dataclass(frozen=True)
class SvdqBiasCodec:
    """One part: a layer's bias (N,), packed. Shifted: also D and U, and the decoded weight that the bias belongs to."""

    shifted: bool

    @property
    def name(self) -> str:
        return "svdq_shifted_bias" if self.shifted else "svdq_bias"

    def decode_into(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        bias = unpack_scales(parts[0]).view(-1).float()
        if self.shifted:
            down, up, weight = parts[1:]
            sums = torch.cat([weight[rows].sum(dim=1, dtype=torch.float32) for rows in row_chunks(weight)])
            sums -= unpack_up(up).float() @ unpack_down(down).float().sum(dim=1)
            bias += SHIFT * sums
        out.copy_(bias)

    def scratch_bytes(self, shape: Sequence[int]) -> int:
        # D of four times as many columns; a chunk of the weight in fp32
        return (5 * shape[0] * MAX_RANK + CHUNK_WEIGHTS) * 6 if self.shifted else shape[0] * 8


@dataclass(frozen=True)
class AwqCodec:
    """Modulation. Three parts: codes (6 N / 4, K / 2) int32, scales and zeros (K / 64, 6 N): code * scale + zero."""

    name: str = "awq_int4"

    def decode_into(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        packed, scales, zeros = parts
        columns = out.shape[1]
        split = out.view(AWQ_SPLITS, -1, columns)
        dims = self._dims(out.shape)
        for start in range(0, split.shape[1], dims):
            rows = slice(start * AWQ_SPLITS, min(start + dims, split.shape[1]) * AWQ_SPLITS)
            codes = unpack_awq(packed[rows.start // 4 : rows.stop // 4])
            weight = codes.float().view(len(codes), -1, AWQ_GROUP)
            del codes
            weight.mul_(self._of_rows(scales, rows, columns)).add_(self._of_rows(zeros, rows, columns))
            split[:, start : start + dims].copy_(weight.view(-1, AWQ_SPLITS, columns).transpose(0, 1))
            del weight

    @staticmethod
    def _of_rows(numbers: Tensor, rows: slice, columns: int) -> Tensor:
        return numbers[: columns // AWQ_GROUP, rows].t().float().unsqueeze(2)

    def scratch_bytes(self, shape: Sequence[int]) -> int:
        return self._dims(shape) * AWQ_SPLITS * shape[1] * _SCRATCH_PER_WEIGHT

    @staticmethod
    def _dims(shape: Sequence[int]) -> int:
        """Dimensions of a chunk: an even number, since rows are interleaved by fours."""
        return min(shape[0] // AWQ_SPLITS, max(1, CHUNK_WEIGHTS // (2 * AWQ_SPLITS * shape[1])) * 2)


@dataclass(frozen=True)
class AwqBiasCodec:
    """One part: the bias of modulation (6 N,), whose scales have the one of 1 + scale added."""

    name: str = "awq_bias"

    def decode_into(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        bias = parts[0].float().view(-1, AWQ_SPLITS).t().contiguous()
        for split in _SCALES_OF_SPLITS:
            bias[split] -= 1
        out.view(AWQ_SPLITS, -1).copy_(bias)

    def scratch_bytes(self, shape: Sequence[int]) -> int:
        return shape[0] * 8


SVDQ_GROUPS: Mapping[str, int] = {"int4": 64, "fp4": 16}
SVDQ: Mapping[str, SvdqCodec] = {
    f"SVDQ_{kind.upper()}_R{rank}": SvdqCodec(kind, group, rank)
    for kind, group in SVDQ_GROUPS.items()
    for rank in range(RANK_STEP, MAX_RANK + 1, RANK_STEP)
}
AWQ, AWQ_BIAS = AwqCodec(), AwqBiasCodec()
SVDQ_BIAS, SVDQ_SHIFTED_BIAS = SvdqBiasCodec(False), SvdqBiasCodec(True)
# by what a tensor is called in a checkpoint; biases by the dtype of their numbers, too
NUNCHAKU: Mapping[str, SvdqCodec | SvdqBiasCodec | AwqCodec | AwqBiasCodec] = {
    **SVDQ,
    "AWQ_INT4": AWQ,
    **{
        f"{codec.name.upper()}_{dtype}": codec
        for codec in (SVDQ_BIAS, SVDQ_SHIFTED_BIAS, AWQ_BIAS)
        for dtype in ("BF16", "F16")
    },
}
# what the parts behind the data are called beside `<layer>.`, in their order
PARTS: Mapping[type, tuple[str, ...]] = {
    SvdqCodec: ("wscales", "smooth_factor", "proj_down", "proj_up", "wcscales", "wtscale"),
    AwqCodec: ("wscales", "wzeros"),
}


def _table(kind: str, device: torch.device) -> Tensor:
    """(256, 2) fp32: what the lower and the higher four bits of a byte stand for. Computed: a list would be copied from
    the host, which waits."""
    code = torch.arange(16, dtype=torch.int32, device=device)
    if kind == "int4":
        numbers = ((code ^ 8) - 8).float()
    else:  # e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same below zero
        exponent, mantissa = (code & 7) >> 1, code & 1
        normal = (((exponent + 126) << 23) | (mantissa << 22)).view(torch.float32)
        numbers = torch.where(exponent == 0, mantissa * 0.5, normal) * (1 - (code >> 3) * 2)
    return torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], dim=1)
