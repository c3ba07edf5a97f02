"""Images of a step that end behind block 0 where what it adds has hardly changed. Holds what is then taken for the
rest."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compute.step_schedules import FirstBlockRule
from .branch_keys import BranchKey
from .passes import Passes


@dataclass
class _Past:
    """Of one branch's last computed step: what block 0 added to its image's tokens, and what the others did."""

    first: Tensor
    others: Tensor


class FirstBlock:
    """Of one run. Branches are told from each other by keys, the same in every step.

    Each image ends behind block 0 by itself, or goes on; the other blocks are fetched once for all that do. Branches of
    one image do so together: guidance multiplies their difference, and with one predicted and the other computed an
    image of the miniature's was 1.7 times as wrong.
    """

    def __init__(self, rule: FirstBlockRule) -> None:
        self._threshold = rule.threshold
        self._past: dict[BranchKey, _Past] = {}
        self._computed: set[float] = set()
        self._ended: set[float] = set()

    @property
    def computed_steps(self) -> int:
        """How many were, for all branches or for some."""
        return len(self._computed)

    @property
    def predicted_steps(self) -> int:
        """How many ended behind block 0 for all branches."""
        return len(self._ended - self._computed)

    def answers(self, passes: Passes, branches: Sequence[object], keys: Sequence[BranchKey]) -> list[Tensor]:
        timestep = passes.timestep
        gates: list[_Gate] = []
        hidden: list[Tensor] = []

        def gate() -> _Gate:
            hidden.clear()
            gates.append(_Gate(self._threshold, self._past, keys))
            return gates[-1]

        more = timestep > passes.last_timestep
        made = passes.compute(branches, more=more, keep=hidden.extend, gate=gate)
        if not hidden:
            passes.ended_early(counted=True)
            self._ended.add(timestep)
            return made
        self._computed.add(timestep)
        for (key, (first, behind)), last in zip(gates[-1].going.items(), hidden, strict=True):
            self._past[key] = _Past(first, last - behind)
        return made

    def clear(self) -> None:
        """Give back what lies on the device."""
        self._past.clear()


class _Gate:
    """Of one pass. going: of each branch that goes on, what block 0 added, and the tokens behind it."""

    def __init__(self, threshold: float, past: dict[BranchKey, _Past], keys: Sequence[BranchKey]) -> None:
        self._threshold, self._past, self._keys = threshold, past, keys
        self.going: dict[BranchKey, tuple[Tensor, Tensor]] = {}

    def behind_first(self, before: Sequence[Tensor], behind: Sequence[Tensor]) -> list[Tensor | None]:
        added = [b - a for a, b in zip(before, behind, strict=True)]
        ended = self._hardly_changed(added)
        instead: list[Tensor | None] = []
        for key, first, tokens in zip(self._keys, added, behind, strict=True):
            if key.image in ended:
                instead.append(tokens + self._past[key].others)
                continue
            instead.append(None)
            self.going[key] = first, tokens
            self._past.pop(key, None)  # its place is needed while the blocks run
        return instead

    def _hardly_changed(self, added: Sequence[Tensor]) -> set[Hashable]:
        """The images of which no branch has changed by more."""
        known = [key in self._past for key in self._keys]
        changes = [_change(added[i], self._past[self._keys[i]].first) for i, is_known in enumerate(known) if is_known]
        if not changes:
            return set()
        told = iter(torch.stack(changes).tolist())  # the host waits here, once a pass
        going = {
            key.image
            for key, is_known in zip(self._keys, known, strict=True)
            if not (is_known and next(told) < self._threshold)
        }
        return {key.image for key in self._keys} - going


def _change(now: Tensor, before: Tensor) -> Tensor:
    """In the mean of absolute numbers, as a part of what was before."""
    return (now - before).abs_().mean(dtype=torch.float32) / before.abs().mean(dtype=torch.float32)
