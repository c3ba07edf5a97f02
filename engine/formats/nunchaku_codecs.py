"""nunchaku's 4-bit formats as codecs: SVDQuant in int4 and fp4, and AWQ in the modulation. Never encodes.

A layer of SVDQuant computes (x / smooth) C^T + (x D^T) U^T + bias, with a matrix C of 4-bit codes and scales and two
thin ones of 16 bits (https://arxiv.org/abs/2411.05007; nunchaku, src/kernels/zgemm/gemm_w4a4_launch_impl.cuh). That is
one matrix, C / smooth + U D, and decodes to it: in fp32, rounded once to the compute dtype. What it is multiplied with
is not quantized here, as it is in nunchaku's kernels, so that results are the formula's and not the kernels'.

In int4 nunchaku adds SHIFT to what the MLP's second layer multiplies with C, because its kernels want no negative
numbers there; the bias in the file makes up for it. Here the bias takes it back: bias + SHIFT * (sums of C's rows).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .byte_tables import look_up_into, take_e2m1, take_table
from .chunks import CHUNK_WEIGHTS, chunk_rows, row_chunks
from .nunchaku_packing import (
    RANK_STEP,
    TILE_ROWS,
    ordered_codes,
    unpack_awq,
    unpack_codes,
    unpacked_down,
    unpacked_micro_scales,
    unpacked_scales,
    unpacked_up,
)
from .scaling import scale_into
from .scratch import Scratch, padded

SHIFT = 0.171875
MAX_RANK = 256
AWQ_GROUP = 64
# rows of modulation that belong to one dimension, in the file's order: shift, scale and gate of attention, of the MLP
AWQ_SPLITS = 6
_SCALES_OF_SPLITS = (1, 4)  # to which the file has added the one of 1 + scale
_SPARE_BYTES = 4096  # of scratch: what pieces are padded with


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

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        packed, packed_scales, smooth, down, up, *others = parts
        columns, step = out.shape[1], self._rows(out.shape, on_host=scratch.on_host)
        with scratch.lent():
            low_rank = take_fp32(unpacked_down(down), scratch).view(-1, columns)
            divisor = take_fp32(unpacked_scales(smooth), scratch).view(1, -1)
            table = _take_table(self.kind, scratch)
            for start in range(0, len(out), step):
                rows = slice(start, min(len(out), start + step))
                count = rows.stop - start
                of_rows = packed_scales.view(-1)[start * columns // self.group : rows.stop * columns // self.group]
                with scratch.lent():
                    weight = scratch.take(count, columns)
                    with scratch.lent():
                        look_up_into(weight, unpack_codes(packed[rows], scratch), table, scratch)
                    scales = self._scales(of_rows.view(-1, count), [part[rows] for part in others[:1]], scratch)
                    for whole in others[1:]:
                        scales.mul_(take_fp32(whole.view(1, 1), scratch))
                    weight.view(count, -1, self.group).mul_(scales.unsqueeze(2))
                    upward = take_fp32(unpacked_up(up[rows]), scratch).view(count, self.rank)
                    out[rows].copy_(weight.div_(divisor).addmm_(upward, low_rank))

    def _scales(self, packed: Tensor, by_row: Sequence[Tensor], scratch: Scratch) -> Tensor:
        """(rows, groups) fp32, those of rows multiplied in."""
        count = packed.shape[1]
        unpacked = unpacked_micro_scales(packed) if self.kind == "fp4" else unpacked_scales(packed)
        scales = take_fp32(unpacked, scratch).view(count, -1)
        for numbers in by_row:
            scales.mul_(take_fp32(unpacked_scales(numbers), scratch).view(count, 1))
        return scales

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        rows = self._rows(shape, on_host=on_host)
        return rows * self._row_bytes(shape[1]) + self._kept_bytes(shape[1])

    def _row_bytes(self, columns: int) -> int:
        """Of scratch: a row in fp32, its codes as 32-bit indices of two of them, or its scales and its part of U."""
        return columns * 4 + max(columns * 3, columns // self.group * 4 + self.rank * 4 + 4)

    def _kept_bytes(self, columns: int) -> int:
        """Of scratch, whatever the rows: D, smooth, the table and what pieces are padded with."""
        return columns * (self.rank + 1) * 4 + 8192

    def _rows(self, shape: Sequence[int], *, on_host: bool) -> int:
        """Rows of a chunk: whole tiles."""
        row_bytes, kept = self._row_bytes(shape[1]), self._kept_bytes(shape[1])
        return chunk_rows(shape, row_bytes, on_host=on_host, kept=kept, tile=TILE_ROWS)


@dataclass(frozen=True)
class SvdqOrderCodec:
    """One part of a layer in int4, in rows and columns: "codes" (N, K / 2), two neighbours of a row in a byte, the
    first one lower; "scales" (N, K / 64); "smooth" (K,); "down" (K, rank); "up" (N, rank). `name`: of the layer's
    codec."""

    name: str
    part: str

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        if self.part == "codes":
            words = ordered_codes(parts[0])
            out.view(torch.int32).view(words.shape).copy_(words)
            return
        ordered = _ORDERS[self.part](parts[0])
        out.view(ordered.shape).copy_(ordered)

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        return 0


@dataclass(frozen=True)
class SvdqBiasCodec:
    """One part: a layer's bias (N,), packed. Shifted: also D and U, and the decoded weight that the bias belongs to."""

    shifted: bool

    @property
    def name(self) -> str:
        return "svdq_shifted_bias" if self.shifted else "svdq_bias"

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        unpacked = unpacked_scales(parts[0])
        if not self.shifted:
            out.view(unpacked.shape).copy_(unpacked)
            return
        down, up, weight = parts[1:]
        with scratch.lent():
            sums = scratch.take(len(weight))
            for rows in row_chunks(weight) if scratch.on_host else (slice(None),):
                torch.sum(weight[rows], dim=1, dtype=torch.float32, out=sums[rows])
            rank, columns = down.shape[1], down.shape[0]
            low_rank = take_fp32(unpacked_down(down), scratch).view(rank, columns)
            upward = take_fp32(unpacked_up(up), scratch).view(len(weight), rank)
            thin = torch.mv(upward, torch.sum(low_rank, dim=1, out=scratch.take(rank)), out=scratch.take(len(weight)))
            out.copy_(take_fp32(unpacked, scratch).view(-1).add_(sums.sub_(thin).mul_(SHIFT)))

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        if not self.shifted:
            return 0
        # D of four times as many columns, and U; on a CPU, D in 16 bits, and what torch takes for sums
        on_cpu = 8 * shape[0] * MAX_RANK + 4 * CHUNK_WEIGHTS if on_host else 0
        return 4 * shape[0] * (5 * MAX_RANK + 4) + 8192 + on_cpu


@dataclass(frozen=True)
class AwqCodec:
    """Modulation. Three parts: codes (6 N / 4, K / 2) int32, scales and zeros (K / 64, 6 N): code * scale + zero."""

    name: str = "awq_int4"

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        packed, scales, zeros = parts
        groups, step = out.shape[1] // AWQ_GROUP, self._dims(out.shape, on_host=scratch.on_host)
        split = out.view(AWQ_SPLITS, -1, groups, AWQ_GROUP)
        for start in range(0, split.shape[1], step):
            dims = slice(start, min(start + step, split.shape[1]))
            rows = slice(dims.start * AWQ_SPLITS, dims.stop * AWQ_SPLITS)
            with scratch.lent():
                codes = unpack_awq(packed[rows.start // 4 : rows.stop // 4], scratch).view(
                    -1, AWQ_SPLITS, groups, AWQ_GROUP
                )
                scale, zero = (
                    take_fp32(numbers[:groups, rows].t(), scratch).view(-1, AWQ_SPLITS, groups, 1).transpose(0, 1)
                    for numbers in (scales, zeros)
                )
                scale_into(split[:, dims], codes.transpose(0, 1), scale, scratch, zero)

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        return self._dims(shape, on_host=on_host) * self._dim_bytes(shape) + _SPARE_BYTES

    @staticmethod
    def _dim_bytes(shape: Sequence[int]) -> int:
        """Of scratch for a dimension: codes twice, in fp32, and scales and zeros."""
        return AWQ_SPLITS * (shape[1] * 6 + shape[1] // AWQ_GROUP * 8)

    def _dims(self, shape: Sequence[int], *, on_host: bool) -> int:
        """Dimensions of a chunk: an even number, since rows are interleaved by fours."""
        of_dims = (shape[0] // AWQ_SPLITS, AWQ_SPLITS * shape[1])
        return chunk_rows(of_dims, self._dim_bytes(shape), on_host=on_host, kept=_SPARE_BYTES, tile=2)


@dataclass(frozen=True)
class AwqBiasCodec:
    """One part: the bias of modulation (6 N,), whose scales have the one of 1 + scale added."""

    name: str = "awq_bias"

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        with scratch.lent():
            bias = take_fp32(parts[0].view(-1, AWQ_SPLITS).t(), scratch)
            for split in _SCALES_OF_SPLITS:
                bias[split].sub_(1)
            out.view(AWQ_SPLITS, -1).copy_(bias)

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        return padded(shape[0] * 4) + padded(shape[0] * 2)


_ORDERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "scales": unpacked_scales,
    "smooth": unpacked_scales,
    "down": lambda packed: unpacked_down(packed).permute(3, 4, 5, 6, 0, 1, 2),
    "up": unpacked_up,
}
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


def take_fp32(numbers: Tensor, scratch: Scratch) -> Tensor:
    """A contiguous copy in fp32."""
    copy = scratch.take(*numbers.shape)
    if not scratch.on_host or numbers.dtype.itemsize != 2:
        return copy.copy_(numbers)
    with scratch.lent():  # a CPU is twice as fast where it does not cast while it puts numbers in order
        return copy.copy_(scratch.take(*numbers.shape, dtype=numbers.dtype).copy_(numbers))


def _take_table(kind: str, scratch: Scratch) -> Tensor:
    """Of bytes, fp32."""
    if kind != "int4":
        return take_table(take_e2m1(torch.float32, scratch), scratch)
    numbers = scratch.take(16)
    torch.arange(8, out=numbers[:8])
    torch.arange(-8, 0, out=numbers[8:])
    return take_table(numbers, scratch)
