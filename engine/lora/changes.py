"""What a stored change adds to a run of rows of a weight, in fp32. Allocates nothing: scratch memory is handed in.

Formulas as ComfyUI's weight adapters define them (comfy/weight_adapter/lora.py, loha.py, lokr.py). Matrices are
(rows, columns); `work` is a flat fp32 tensor, and every function's use of it is told by the `elements` beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from ..files.checkpoint import TensorEntry


class Change(Protocol):
    """A matrix of `shape`, made from `parts`, that is never whole in memory."""

    @property
    def kind(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def parts(self) -> tuple[TensorEntry, ...]: ...

    def elements(self, rows: int) -> int:
        """The most that `add_rows` takes of `work` for so many rows."""

    def add_rows(self, out: Tensor, start: int, parts: Sequence[Tensor], factor: float, work: Tensor) -> None:
        """Add factor * (rows from `start` on) to `out`, which is contiguous fp32."""


@dataclass(frozen=True)
class Matrix:
    """One stored matrix, or the product of two."""

    entries: tuple[TensorEntry, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.entries[0].shape[0], self.entries[-1].shape[1]

    @property
    def is_product(self) -> bool:
        return len(self.entries) == 2

    @property
    def shared(self) -> int:
        """The dimension that a product's matrices share: a LoRA's rank."""
        return self.entries[-1].shape[0]

    def operand_elements(self, rows: int) -> int:
        """What `operands` takes of `work`."""
        return fp32_elements(self.entries[0], rows) + sum(
            fp32_elements(entry, entry.shape[0]) for entry in self.entries[1:]
        )

    def elements(self, rows: int) -> int:
        """The most that `rows` takes of `work`."""
        return self.operand_elements(rows) + (rows * self.shape[1] if self.is_product else 0)

    def operands(self, start: int, stop: int, parts: Sequence[Tensor], work: Tensor) -> tuple[list[Tensor], Tensor]:
        """The stored matrices in fp32, the first one's rows from `start` to `stop`; and what is left of `work`."""
        first, work = as_fp32(parts[0][start:stop], work)
        if len(parts) == 1:
            return [first], work
        second, work = as_fp32(parts[1], work)
        return [first, second], work

    def rows(self, start: int, stop: int, parts: Sequence[Tensor], work: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in fp32, and what is left of `work` when they are kept."""
        if len(parts) == 1:
            (rows,), work = self.operands(start, stop, parts, work)
            return rows, work
        out, work = carve(work, stop - start, self.shape[1])
        (left, right), _ = self.operands(start, stop, parts, work)
        return torch.mm(left, right, out=out), work


@dataclass(frozen=True)
class Sum:
    """LoRA (up @ down), or a whole matrix of differences."""

    matrix: Matrix

    @property
    def kind(self) -> str:
        return "LoRA" if self.matrix.is_product else "diff"

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return self.matrix.entries

    def elements(self, rows: int) -> int:
        return self.matrix.operand_elements(rows)

    def add_rows(self, out: Tensor, start: int, parts: Sequence[Tensor], factor: float, work: Tensor) -> None:
        operands, _ = self.matrix.operands(start, start + len(out), parts, work)
        if len(operands) == 2:
            out.addmm_(*operands, alpha=factor)
        else:
            out.add_(operands[0], alpha=factor)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: two products, multiplied element by element."""

    first: Matrix
    second: Matrix
    kind = "LoHa"

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return self.first.entries + self.second.entries

    def elements(self, rows: int) -> int:
        return self.first.elements(rows) + self.second.elements(rows)

    def add_rows(self, out: Tensor, start: int, parts: Sequence[Tensor], factor: float, work: Tensor) -> None:
        count = len(self.first.entries)
        first, work = self.first.rows(start, start + len(out), parts[:count], work)
        second, _ = self.second.rows(start, start + len(out), parts[count:], work)
        out.addcmul_(first, second, value=factor)


@dataclass(frozen=True)
class Kronecker:
    """LoKr: each element of `outer` (a, b) times the whole of `inner` (c, d) is a tile of an (a * c, b * d) matrix."""

    outer: Matrix
    inner: Matrix
    kind = "LoKr"

    @property
    def shape(self) -> tuple[int, int]:
        (a, b), (c, d) = self.outer.shape, self.inner.shape
        return a * c, b * d

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return self.outer.entries + self.inner.entries

    def elements(self, rows: int) -> int:
        return self.outer.elements(self.outer.shape[0]) + self.inner.elements(min(rows, self.inner.shape[0]))

    def add_rows(self, out: Tensor, start: int, parts: Sequence[Tensor], factor: float, work: Tensor) -> None:
        (a, b), (c, d) = self.outer.shape, self.inner.shape
        count = len(self.outer.entries)
        outer, work = self.outer.rows(0, a, parts[:count], work)
        done = 0
        while done < len(out):
            tile, row = divmod(start + done, c)
            left = len(out) - done
            # whole tiles together, or the rows of one that the run begins or ends within
            tiles, height = (left // c, c) if row == 0 and left >= c else (1, min(c - row, left))
            inner, _ = self.inner.rows(row, row + height, parts[count:], work)
            piece = out[done : done + tiles * height].view(tiles, height, b, d)
            piece.addcmul_(outer[tile : tile + tiles].view(tiles, 1, b, 1), inner.view(1, height, 1, d), value=factor)
            done += tiles * height


def fp32_elements(entry: TensorEntry, rows: int) -> int:
    """What `as_fp32` takes of `work` for so many rows of a part."""
    return 0 if entry.dtype == "F32" else rows * prod(entry.shape[1:])


def as_fp32(part: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
    """`part` in fp32, itself or a copy at the beginning of `work`; and what is left of `work`."""
    if part.dtype is torch.float32:
        return part, work
    copy, work = carve(work, *part.shape)
    return copy.copy_(part), work


def carve(work: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """A tensor of `shape` at the beginning of `work`, and the rest."""
    return work[: prod(shape)].view(shape), work[prod(shape) :]
