"""Changes of layers that a file holds joined with others, or apart, as changes of rows of its own weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from torch import Tensor

from ..errors import Unsupported
from ..files.checkpoint import TensorEntry
from ..models.layer_rows import OtherNames, Rows
from .changes import Change, Hadamard, Matrix, Sum
from .deltas import Delta, Norm
from .whole_change import WholeChange


@dataclass(frozen=True)
class RowsOf:
    """`rows` rows of a change, from `first` on, where its parts cannot be cut."""

    change: Change
    first: int
    rows: int

    @property
    def kind(self) -> str:
        return self.change.kind

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.change.shape[1]

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return self.change.parts

    def elements(self, rows: int) -> int:
        return self.change.elements(rows)

    def add_rows(self, out: Tensor, start: int, parts: Sequence[Tensor], factor: float, work: Tensor) -> None:
        self.change.add_rows(out, self.first + start, parts, factor, work)


def placed(delta: Delta, weights: Mapping[str, tuple[int, ...]], others: OtherNames, file: Path) -> dict[str, Delta]:
    """The delta of any of the model's names as deltas of the file's own weights, by the finest names.

    What a joined layer's delta does to each of its parts is computed as where the file holds them apart, so that both
    files make the same bits. Raises Unsupported where it can be told for the whole alone and the file holds the parts.
    """
    pieces = _pieces(delta.weight, weights, others)
    if len(pieces) > 1 and not _can_be_cut(delta):
        own = {rows.weight for _, rows in pieces}
        if len(own) == 1:
            return {delta.weight: delta}
        raise Unsupported(
            "{file} changes {weight} by {kind} of the whole layer, which this model's file holds as {parts}. Use a "
            "model file that holds it in one piece, such as ComfyUI's.",
            code="lora.whole_of_apart",
            file=file,
            weight=delta.weight,
            kind=delta.kind,
            parts=" and ".join(sorted(own)),
        )
    made, first = dict[str, Delta](), 0
    for name, rows in pieces:
        count = rows.stop - rows.start
        cut = delta if len(pieces) == 1 else _cut(delta, first, count)
        shape = weights[rows.weight]
        part = None if count == shape[0] else range(rows.start, rows.stop)
        made[name] = replace(cut, weight=rows.weight, shape=shape, part=part)
        first += count
    return made


def _pieces(name: str, weights: Mapping[str, tuple[int, ...]], others: OtherNames) -> list[tuple[str, Rows]]:
    """The file's rows that a name stands for, each with the finest name that it has."""
    if name in others:
        rows = others[name]
        return [(name if len(rows) == 1 else part.weight, part) for part in rows]
    within = [(other, rows[0]) for other, rows in others.items() if len(rows) == 1 and rows[0].weight == name]
    within.sort(key=lambda piece: piece[1].start)
    return within or [(name, Rows(name, 0, weights[name][0]))]


def _can_be_cut(delta: Delta) -> bool:
    by_columns = delta.dora is not None and delta.dora.norm is Norm.COLUMN
    return not (by_columns or isinstance(delta.change, WholeChange))


def _cut(delta: Delta, first: int, rows: int) -> Delta:
    assert not isinstance(delta.change, WholeChange)
    dora = delta.dora and replace(delta.dora, magnitude=_cut_entry(delta.dora.magnitude, first, rows))
    return replace(delta, change=_cut_change(delta.change, first, rows), dora=dora)


def _cut_change(change: Change, first: int, rows: int) -> Change:
    if isinstance(change, Sum):
        return Sum(_cut_matrix(change.matrix, first, rows))
    if isinstance(change, Hadamard):
        return Hadamard(_cut_matrix(change.first, first, rows), _cut_matrix(change.second, first, rows))
    return RowsOf(change, first, rows)


def _cut_matrix(matrix: Matrix, first: int, rows: int) -> Matrix:
    left, *others = matrix.entries
    return Matrix((_cut_entry(left, first, rows), *others))


def _cut_entry(entry: TensorEntry, first: int, rows: int) -> TensorEntry:
    """Rows of a tensor whose bytes lie row by row."""
    row_bytes = entry.nbytes // entry.shape[0]
    begin, nbytes = first * row_bytes, rows * row_bytes
    assert row_bytes * prod(entry.shape[:1]) == entry.nbytes
    data = None if entry.data is None else memoryview(entry.data)[begin : begin + nbytes]
    return replace(entry, offset=entry.offset + begin, nbytes=nbytes, shape=(rows, *entry.shape[1:]), data=data)
