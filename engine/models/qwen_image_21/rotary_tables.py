"""Rotary factors on the device: made and brought when a pass first needs them, and kept for the next one."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .positions import Piece, RotaryTables

Place = tuple[tuple[Piece, ...], int]  # pieces of a sequence, and the position that they begin at


class PlacedFactors:
    """Of the present pass; those that it does not need leave. What stands at the same place shares them."""

    def __init__(self, tables: RotaryTables, device: torch.device) -> None:
        self._tables, self._device = tables, device
        self._factors: dict[Place, Tensor] = {}

    def bring(self, places: Iterable[Place]) -> None:
        """A pass begins that asks for these. Raises InvalidRequest for positions beyond the tables."""
        wanted = tuple(dict.fromkeys(places))
        self._factors = {place: self._factors[place] for place in wanted if place in self._factors}
        for place in wanted:
            if place not in self._factors:
                self._factors[place] = self._tables.factors(*place).to(self._device)

    def of(self, place: Place) -> Tensor:
        """Of each token, (tokens, head_dim / 2) complex; one of those that were brought."""
        return self._factors[place]

    def leave_device(self) -> None:
        self._factors.clear()
