"""Products with a weight as it is stored: x is quantized as the format defines, and the stored numbers are multiplied.

Each is comfy-kitchen's, by its own kernels where it has any for the device. What it computes is another result than
that of the decoded weight, within what quantizing x costs. Here is what they have in common.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..formats.scratch import SCRATCH_BYTES
from .linear_layers import LayerScratch

# its forms for any device, made of many operators of torch's, which take more memory than the result
FOR_ANY_DEVICE = "eager"
WORKSPACE_BYTES = 32 * 1024**2  # that comfy-kitchen's CUDA kernels keep for cuBLAS
_LEAST_TOKENS = 64
_LEAST_ROWS = 128  # as many as any format stores together


class StoredProduct(Protocol):
    """x @ weight.T + bias of a weight's stored parts, the data first. Values: equal ones compute the same."""

    @property
    def name(self) -> str:
        """What a person reads: the numbers that are multiplied."""

    @property
    def backend(self) -> str:
        """Of comfy-kitchen's, that computes it."""

    @property
    def parts_by_row(self) -> int:
        """How many of the parts, the first ones, have something for each row of the weight, where they have as many."""

    @property
    def tile_rows(self) -> int:
        """How many rows of the weight have the part behind these in common; 1: none."""

    @property
    def of_all_tokens(self) -> bool:
        """Whether what one token makes depends on the others, so that no layer before it may be given some of them."""

    def measured(self, x: Tensor) -> list[Tensor]:
        """Further parts, of all rows of x."""

    def __call__(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """(M, N) in the dtype of x, (M, K) contiguous."""

    def some_parts(self, rows: int, columns: int, device: torch.device) -> list[Tensor]:
        """Of a weight of that shape, of any numbers, to measure with."""

    def row_bytes(self, columns: int, rows: int, element_bytes: int) -> int:
        """What it takes beside x and the result for each row of x; of a weight (rows, columns)."""

    def fixed_bytes(self, columns: int, rows: int) -> int:
        """What it takes however many rows x has."""

    def unpacking_bytes(self, columns: int, rows: int) -> int:
        """What it takes, and gives back, before it takes anything for x."""


class OfAnyRows:
    """Of products that multiply each row of x, and of the weight, as if there were no others."""

    tile_rows = 1
    of_all_tokens = False

    def measured(self, x: Tensor) -> list[Tensor]:
        return []

    def unpacking_bytes(self, columns: int, rows: int) -> int:
        return 0


def rows_of(product: StoredProduct, parts: Sequence[Tensor], rows: int, start: int, stop: int) -> list[Tensor]:
    """The parts of the weight's rows `start` to `stop`, of so many rows: whole tiles, or to the end."""
    count, tile = product.parts_by_row, product.tile_rows
    found = [part[start:stop] if part.shape[:1] == (rows,) else part for part in parts[:count]]
    if tile > 1:
        tiles = parts[count].reshape(-(-rows // tile), -1)
        found.append(tiles[start // tile : -(-stop // tile)])
    return [*found, *parts[len(found) :]]


@dataclass(frozen=True)
class AtOnce:
    """How many rows of x, and of the weight, are multiplied at a time."""

    tokens: int
    rows: int


def at_once(product: StoredProduct, columns: int, rows: int, element_bytes: int) -> AtOnce | None:
    """So that what is taken beside them stays small; None: all. Depends on the weight's shape alone, so that results do
    not depend on memory."""
    if product.backend != FOR_ANY_DEVICE:
        return None
    fixed = max(product.fixed_bytes(columns, rows), product.unpacking_bytes(columns, rows))
    if fixed > SCRATCH_BYTES:
        rows = min(rows, max(_LEAST_ROWS, SCRATCH_BYTES * rows // fixed // _LEAST_ROWS * _LEAST_ROWS))
    tokens = SCRATCH_BYTES // product.row_bytes(columns, rows, element_bytes)
    return AtOnce(max(_LEAST_TOKENS, tokens), rows)


def layer_scratch(product: StoredProduct, columns: int, rows: int, element_bytes: int) -> LayerScratch:
    """What a layer takes that computes so."""
    together, widest = at_once(product, columns, rows, element_bytes), max(columns, rows)
    rows = rows if together is None else together.rows
    return LayerScratch(
        product.row_bytes(columns, rows, element_bytes),
        product.fixed_bytes(columns, rows),
        None if together is None else together.tokens,
        product.unpacking_bytes(columns, rows),
        widest,
    )
