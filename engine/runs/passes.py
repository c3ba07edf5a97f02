"""One evaluation of a run: passes through the blocks, or answers without one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..models.network import Gate
from ..streaming import OnBlock
from .pass_clock import PassClock
from .sampling_session import SamplingSession


@dataclass(frozen=True)
class Passes:
    """timestep: of this evaluation; last_timestep: of the run's last step. session: the open one, opened again where
    memory had run out. attempt: does something, and again with a smaller plan where memory runs out."""

    timestep: float
    last_timestep: float
    session: Callable[[], SamplingSession]
    attempt: Callable[[Callable[[], list[Tensor]]], list[Tensor]]
    clock: PassClock
    on_block: OnBlock
    check: Callable[[], None]

    def compute(
        self,
        branches: Sequence[Any],
        hooked: Sequence[Any] = (),
        *,
        more: bool,
        keep: Callable[[Sequence[Tensor]], None] | None = None,
        gate: Callable[[], Gate] | None = None,
    ) -> list[Tensor]:
        """As `TransformerSession.forward`; `gate` makes one for each attempt."""

        def forward() -> list[Tensor]:
            return self.session().forward(
                branches,
                hooked=hooked,
                more=more,
                on_block=self.on_block,
                check=self.check,
                keep=keep,
                gate=None if gate is None else gate(),
            )

        with self.clock.measuring():
            return self.attempt(forward)

    def answers_of(self, branches: Sequence[Any], hidden: Sequence[Tensor]) -> list[Tensor]:
        """Without a pass, as `TransformerSession.answers_of`."""
        return self.attempt(lambda: self.session().answers_of(branches, hidden))

    def ended_early(self, *, counted: bool = False) -> None:
        """No pass came to the last block. Whoever looks at the timestep there looks now, and may raise: it was another.
        `counted`: one was begun, whose seconds are not those of a pass."""
        if counted:
            self.clock.uncount()
        self.on_block(self.session().plan.blocks - 1)
