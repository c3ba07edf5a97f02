"""Add stacked LoRAs to a weight: in fp32, rounded once, in scratch memory that is handed in. Reads no file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from math import isfinite, prod

import torch
from torch import Tensor

from ..errors import InvalidRequest
from ..files.checkpoint import TensorEntry
from ..formats.chunks import LORA_CHUNK_WEIGHTS as CHUNK_WEIGHTS
from ..formats.chunks import even_rows
from .changes import Change, as_fp32, carve, fp32_elements
from .whole_change import WholeChange

_EPS = torch.finfo(torch.float32).eps


class Norm(Enum):
    """What DoRA's magnitudes are divided by: one number for each row, or for each column."""

    ROW_OF_BASE = "rows of the weight before its change"  # as ComfyUI reads a dora_scale of rows
    ROW = "rows of the changed weight"  # PEFT's lora_magnitude_vector
    COLUMN = "columns of the changed weight"


@dataclass(frozen=True)
class Dora:
    """Magnitudes of a changed weight's rows or columns: (changed weight) * magnitude / norm takes its place."""

    magnitude: TensorEntry
    norm: Norm


@dataclass(frozen=True)
class Delta:
    """What one LoRA file does to one weight of `shape`: adds scale * change, then normalises where it is a DoRA.

    part: the rows that it changes, where the weight holds other layers beside; None for all.

    `parts` are to be brought from the file as raw bytes; all methods take them in this order, as tensors.
    """

    weight: str
    shape: tuple[int, ...]
    change: Change | WholeChange
    scale: float = 1.0
    dora: Dora | None = None
    part: range | None = None

    @property
    def rows(self) -> range:
        """Of the weight, that it changes."""
        return range(self.shape[0]) if self.part is None else self.part

    @property
    def kind(self) -> str:
        return self.change.kind if self.dora is None else f"{self.change.kind} with DoRA"

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return self.change.parts if self.dora is None else (*self.change.parts, self.dora.magnitude)

    @property
    def nbytes(self) -> int:
        """Of the stored parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def allocated_bytes(self) -> int:
        """What it allocates by itself, at the most."""
        return self.change.allocated_bytes if isinstance(self.change, WholeChange) else 0

    def work_elements(self, rows: int) -> int:
        """Scratch beside the fp32 copy of so many rows, in fp32 numbers."""
        if isinstance(self.change, WholeChange):
            return 0
        changing = self.change.elements(rows)
        if self.dora is None:
            return changing
        columns = self.change.shape[1]
        magnitudes = (
            columns + fp32_elements(self.dora.magnitude, columns)
            if self.dora.norm is Norm.COLUMN
            else rows + fp32_elements(self.dora.magnitude, rows)
        )
        return rows * columns + max(changing, magnitudes)


Stack = Sequence[tuple[Delta, Sequence[Tensor], float]]


def scratch_elements(shape: Sequence[int], deltas: Sequence[Delta]) -> int:
    """The fp32 numbers that `apply` needs in `scratch` for these deltas of a weight of `shape`."""
    parted = _parted(deltas)
    if parted is None:
        by_rows = (delta for delta in deltas if not isinstance(delta.change, WholeChange))
        each = (_scratch_of_rows((len(delta.rows), *shape[1:]), [delta]) for delta in by_rows)
        return prod(shape) + max(each, default=0)
    return max((_scratch_of_rows((len(rows), *shape[1:]), own) for rows, own in parted.items()), default=0)


def _scratch_of_rows(shape: Sequence[int], deltas: Sequence[Delta]) -> int:
    """The same of deltas that all change the same rows, `shape` of them."""
    rows, columns = even_rows(shape, CHUNK_WEIGHTS), prod(shape[1:])
    per_column = sum(delta.dora is not None and delta.dora.norm is Norm.COLUMN for delta in deltas)
    whole = prod(shape) if any(isinstance(delta.change, WholeChange) for delta in deltas) else 0
    return (
        whole + rows * columns + max((delta.work_elements(rows) for delta in deltas), default=0) + per_column * columns
    )


def _parted(deltas: Sequence[Delta]) -> dict[range, list[Delta]] | None:
    """By the rows that they change; None where some change a part of the rows that others do."""
    parted: dict[range, list[Delta]] = {}
    for delta in deltas:
        parted.setdefault(delta.rows, []).append(delta)
    ordered = sorted(parted, key=lambda rows: rows.start)
    return None if any(one.stop > other.start for one, other in pairwise(ordered)) else parted


def apply(weight: Tensor, stack: Stack, scratch: Tensor) -> None:
    """Change `weight` in place by each (delta, its parts, strength) in turn.

    Computed in fp32 in runs of rows, each rounded once to the weight's dtype when all deltas are in. A DoRA's strength
    moves the weight on the line from what it was to what the DoRA makes of it. Strength 0 changes nothing.

    weight: contiguous, any floating dtype. scratch: flat fp32 of `scratch_elements` numbers at least, on the weight's
    device, as are all parts. Nothing else is allocated, but for the deltas' `allocated_bytes`, and what matrix products
    and reductions take inside themselves on a GPU (cuBLAS keeps one workspace per stream). The result depends on no
    size but the weight's.
    Raises InvalidRequest for a weight, parts or scratch that do not belong to the deltas.
    """
    stack = [(delta, parts, strength) for delta, parts, strength in stack if strength != 0]
    _check(weight, stack, scratch)
    if not stack or not weight.numel():
        return
    parted = _parted([delta for delta, _, _ in stack])
    if parted is None:
        _apply_whole(weight, stack, scratch)
        return
    for rows in parted:
        _apply_to_rows(weight[rows.start : rows.stop], [one for one in stack if one[0].rows == rows], scratch)


def _apply_to_rows(weight: Tensor, stack: Stack, scratch: Tensor) -> None:
    """Of deltas that all change these rows."""
    if any(isinstance(delta.change, WholeChange) for delta, _, _ in stack):
        shape = tuple(weight.shape)
        stack = [(replace(delta, shape=shape, part=None), parts, strength) for delta, parts, strength in stack]
        _apply_whole(weight, stack, scratch)
        return
    matrix = weight.view(len(weight), -1)
    factors: list[Tensor | None] = []
    for i, (delta, parts, _) in enumerate(stack):
        factor = None
        if delta.dora is not None and delta.dora.norm is Norm.COLUMN:
            factor, scratch = carve(scratch, matrix.shape[1])
            _column_factors(factor, matrix, stack[:i], factors, delta, parts, scratch)
        factors.append(factor)
    for start, rows, work in _chunks(matrix, scratch):
        for (delta, parts, strength), factor in zip(stack, factors, strict=True):
            _change_rows(rows, start, delta, parts, strength, factor, work)
        matrix[start : start + len(rows)].copy_(rows)


def _apply_whole(weight: Tensor, stack: Stack, scratch: Tensor) -> None:
    """One after another, where some take all of their rows at once or rows of others: on a copy in fp32."""
    whole, scratch = carve(scratch, *weight.shape)
    whole.copy_(weight)
    for delta, parts, strength in stack:
        rows = whole[delta.rows.start : delta.rows.stop]
        if isinstance(delta.change, WholeChange):
            delta.change.change(rows.view(len(rows), -1), parts, strength)
        else:
            _apply_to_rows(rows, [(delta, parts, strength)], scratch)
    weight.copy_(whole)


def _column_factors(
    out: Tensor,
    matrix: Tensor,
    before: Stack,
    factors: Sequence[Tensor | None],
    delta: Delta,
    parts: Sequence[Tensor],
    scratch: Tensor,
) -> None:
    """What a DoRA multiplies each column with: a pass over the weight as the deltas `before` it make it."""
    out.zero_()
    for start, rows, work in _chunks(matrix, scratch):
        for (earlier, its_parts, strength), factor in zip(before, factors, strict=True):
            _change_rows(rows, start, earlier, its_parts, strength, factor, work)
        changed, work = _changed(rows, start, delta, parts, work)
        squares, _ = carve(work, matrix.shape[1])
        out.add_(torch.sum(changed.mul_(changed), dim=0, out=squares))
    magnitude, _ = as_fp32(parts[-1], scratch)
    torch.div(magnitude, out.sqrt_().add_(_EPS), out=out)


def _change_rows(
    rows: Tensor,
    start: int,
    delta: Delta,
    parts: Sequence[Tensor],
    strength: float,
    factor: Tensor | None,
    work: Tensor,
) -> None:
    if delta.dora is None:
        _by_rows(delta).add_rows(rows, start, parts, strength * delta.scale, work)
        return
    changed, work = _changed(rows, start, delta, parts, work)
    if factor is None:
        factor, work = carve(work, len(rows), 1)
        of = rows if delta.dora.norm is Norm.ROW_OF_BASE else changed
        torch.linalg.vector_norm(of, dim=1, keepdim=True, out=factor)
        magnitude, _ = as_fp32(parts[-1][start : start + len(rows)].view(-1, 1), work)
        torch.div(magnitude, factor.add_(_EPS), out=factor)
    changed.mul_(factor)
    rows.add_(changed.sub_(rows), alpha=strength)


def _changed(rows: Tensor, start: int, delta: Delta, parts: Sequence[Tensor], work: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of `rows` at the beginning of `work` with the whole change added; and the rest of `work`."""
    changed, work = carve(work, *rows.shape)
    _by_rows(delta).add_rows(changed.copy_(rows), start, parts[:-1], delta.scale, work)
    return changed, work


def _by_rows(delta: Delta) -> Change:
    if isinstance(delta.change, WholeChange):
        raise InvalidRequest(
            "{kind} of {weight} needs the whole weight, not some of its rows.",
            code="lora.needs_whole_weight",
            kind=delta.kind,
            weight=delta.weight,
        )
    return delta.change


def _chunks(matrix: Tensor, scratch: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Runs of rows: the first one's index, a copy in fp32 at the beginning of `scratch`, and the rest of that."""
    step = even_rows(matrix.shape, CHUNK_WEIGHTS)
    for start in range(0, len(matrix), step):
        stored = matrix[start : start + step]
        rows, work = carve(scratch, *stored.shape)
        yield start, rows.copy_(stored), work


def _check(weight: Tensor, stack: Stack, scratch: Tensor) -> None:
    for delta, parts, strength in stack:
        if tuple(weight.shape) != delta.shape or len(parts) != len(delta.parts) or not isfinite(strength):
            raise InvalidRequest(
                "{kind} of {weight} needs a weight of {shape}, {parts_count} parts and a finite strength; got "
                "{given_shape}, {given_parts_count} and {strength}.",
                code="lora.wrong_weight",
                kind=delta.kind,
                weight=delta.weight,
                shape=list(delta.shape),
                parts_count=len(delta.parts),
                given_shape=list(weight.shape),
                given_parts_count=len(parts),
                strength=strength,
            )
    needed = scratch_elements(weight.shape, [delta for delta, _, _ in stack])
    if scratch.dtype is not torch.float32 or scratch.device != weight.device or scratch.numel() < needed:
        raise InvalidRequest(
            "Changing a weight of {shape} needs scratch space for {needed} fp32 numbers on {device}; got {given} in "
            "{given_dtype} on {given_device}.",
            code="lora.wrong_scratch",
            shape=list(weight.shape),
            needed=needed,
            device=weight.device,
            given=scratch.numel(),
            given_dtype=scratch.dtype,
            given_device=scratch.device,
        )
