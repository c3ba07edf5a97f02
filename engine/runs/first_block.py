"""Steps of a run that end behind block 0 where what it adds has hardly changed. Holds what is then taken for the
rest."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compute.step_schedules import FirstBlockRule
from .passes import Passes


@dataclass
class _Past:
    """Of one branch's last computed step: what block 0 added to its image's tokens, and what the others did."""

    first: Tensor
    others: Tensor


class FirstBlock:
    """Of one run. Branches are told from each other by keys, the same in every step.

    Those of one evaluation end behind block 0 together, where each of them may, or go on together: guidance multiplies
    the difference of two, and with one of them predicted and the other computed it is several times as wrong. A pass
    that fails is made again with nothing left out.
    """

    def __init__(self, rule: FirstBlockRule) -> None:
        self._threshold = rule.threshold
        self._past: dict[Hashable, _Past] = {}
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

    def answers(self, passes: Passes, branches: Sequence[object], keys: Sequence[Hashable]) -> list[Tensor]:
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
        for key, (first, behind), last in zip(keys, gates[-1].going, hidden, strict=True):
            self._past[key] = _Past(first, last - behind)
        return made

    def clear(self) -> None:
        """Give back what lies on the device."""
        self._past.clear()


class _Gate:
    """Of one pass. going: of each branch, if they go on, what block 0 added, and the tokens behind it."""

    def __init__(self, threshold: float, past: dict[Hashable, _Past], keys: Sequence[Hashable]) -> None:
        self._threshold, self._past, self._keys = threshold, past, keys
        self.going: list[tuple[Tensor, Tensor]] = []

    def behind_first(self, before: Sequence[Tensor], behind: Sequence[Tensor]) -> list[Tensor] | None:
        added = [b - a for a, b in zip(before, behind, strict=True)]
        pasts = [self._past[key] for key in self._keys if key in self._past]
        if len(pasts) == len(added):
            changes = [_change(now, past.first) for now, past in zip(added, pasts, strict=True)]
            if max(torch.stack(changes).tolist()) < self._threshold:  # the host waits here, once a pass
                return [tokens + past.others for tokens, past in zip(behind, pasts, strict=True)]
        self.going = list(zip(added, behind, strict=True))
        for key in self._keys:
            self._past.pop(key, None)  # its place is needed while the blocks run
        return None


def _change(now: Tensor, before: Tensor) -> Tensor:
    """In the mean of absolute numbers, as a part of what was before."""
    return (now - before).abs_().mean(dtype=torch.float32) / before.abs().mean(dtype=torch.float32)
