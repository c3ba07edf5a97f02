"""Rotary tables on the device: made and brought when a pass first needs them, and kept for the next one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .branch import Branch
from .positions import Place, Shape

# of images and their places, and the prompt's length: all that tables depend on
_Key = tuple[tuple[Shape, ...], tuple[Place, ...], int]


class RotaryTables:
    """Of the present pass; those that it does not need leave. Branches of the same sizes share theirs."""

    def __init__(
        self,
        make: Callable[[Sequence[Shape], Sequence[Place], int], Sequence[Tensor]],
        device: torch.device,
    ) -> None:
        """`make`: of shapes, places and a prompt's length, on the host; it may raise."""
        self._make = make
        self._device = device
        self._tables: dict[_Key, tuple[Tensor, Tensor]] = {}

    def of(self, branches: Sequence[Branch]) -> list[tuple[Tensor, Tensor]]:
        """Of the image tokens and of the prompt of each branch, as `make` has them."""
        keys = [(tuple(b.shapes), tuple(b.places), b.prompt_embeds.shape[1]) for b in branches]
        self._tables = {key: self._tables[key] for key in keys if key in self._tables}
        for key in keys:
            if key not in self._tables:
                images, text = self._make(*key)
                self._tables[key] = images.to(self._device), text.to(self._device)
        return [self._tables[key] for key in keys]

    def leave_device(self) -> None:
        self._tables.clear()
