"""Timesteps that lie on the device, known to the host without waiting for it: they are expected in the order of the
schedule, and looked at when the device has come by."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from ..streaming import StreamOrder

# of a pass: when it begins, the device has done all that was issued before the pass
BLOCK_OF_LOOK = 1

T = TypeVar("T")
OnBlock = Callable[[int], None]


class _OtherTimesteps(Exception):
    """A pass was begun for others than were asked for."""


class ExpectedTimesteps:
    """Of one run. Once they were others than expected, the host waits for them.

    A sampler knows its schedule on the device alone. To wait for a timestep is to wait for all of the step before.
    """

    def __init__(self, order: StreamOrder, announced: Sequence[float]) -> None:
        """`announced`: in the order in which a sampler with one evaluation a step asks for them."""
        self._order = order
        self._expected: list[float] | None = list(dict.fromkeys(announced))

    def run(self, asked: Tensor, compute: Callable[[list[float], OnBlock], T], *, ahead: bool) -> T:
        """`compute(timesteps, on_block)` with the values of `asked` (n,), in fp32 on the device or the host. It calls
        `on_block` before each block; not `ahead`: the host waits for the values first.

        What was computed of others is computed again.
        """
        if asked.device.type == "cpu" or not ahead or not self._expected:
            return self._certainly(asked.tolist(), compute)
        values = asked.to("cpu", non_blocking=True)
        copied = self._order.mark()
        self._order.record_compute(copied)
        guess = [self._expected[0]] * len(asked)
        looked = False

        def look(index: int) -> None:
            nonlocal looked
            if looked or index < BLOCK_OF_LOOK:
                return
            looked = True
            self._order.host_waits(copied)
            if values.tolist() != guess:
                raise _OtherTimesteps

        try:
            made = compute(guess, look)
            look(BLOCK_OF_LOOK)  # of fewer blocks
        except _OtherTimesteps:
            self._expected = None
        else:
            self._expected = self._expected[1:]
            return made
        return self._certainly(values.tolist(), compute)

    def _certainly(self, values: list[float], compute: Callable[[list[float], OnBlock], T]) -> T:
        made = compute(values, lambda index: None)
        if self._expected:  # who asks for one of them twice is expected to do so no more
            self._expected = [t for t in self._expected if t < min(values, default=0.0)]
        return made
