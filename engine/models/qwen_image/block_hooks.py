"""Let others do something around the blocks, for branches that belong together. Knows no block's inside."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .branch import BranchState

# (images' states (B, N, dim), texts' states (B, L, dim))
States = tuple[Tensor, Tensor]


class BlockHook(Protocol):
    """What is done around a block for B branches of the same sizes."""

    def __call__(
        self, index: int, states: States, temb: Tensor, rotary: States, block: Callable[[Tensor, Tensor], States]
    ) -> States:
        """Run block `index` on the states, or something in its place, and return the states behind it; what it was
        given may be changed in place.

        temb: (B, dim) of the timestep, with zero_cond_t those of timestep 0 behind them (2 * B, dim). rotary: complex
        (N, head_dim / 2) and (L, head_dim / 2); it cannot be changed. All are on one device.
        """
        ...


def run_hooked(branches: Sequence[BranchState], hook: BlockHook, index: int, block: torch.nn.Module) -> None:
    """Run one block on branches of the same sizes, through their hook."""

    def run(img: Tensor, txt: Tensor) -> States:
        _share(branches, img, txt)
        for branch in branches:
            branch.run(index, block)
        return _join([branch.img for branch in branches]), _join([branch.txt for branch in branches])

    first = branches[0]
    states = _join([branch.img for branch in branches]), _join([branch.txt for branch in branches])
    rows = range(len(first.temb))
    temb = _join([branch.temb[row : row + 1] for row in rows for branch in branches])
    _share(branches, *hook(index, states, temb, first.rotary, run))


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _share(branches: Sequence[BranchState], img: Tensor, txt: Tensor) -> None:
    for i, branch in enumerate(branches):
        branch.img, branch.txt = img[i : i + 1], txt[i : i + 1]
