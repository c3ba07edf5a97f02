"""When a stream's work runs: at once, or as late as the host and the events allow, or by chance. All are legal."""

import random
from collections.abc import Callable, Sequence
from typing import Protocol

# of random schedules: how many streams move after each piece of work is issued, and how far, at the most
MOST_TURNS, MOST_WORK = 2, 5


class Runnable(Protocol):
    """A stream, as far as a schedule sees it."""

    computes: bool

    @property
    def waiting(self) -> int:
        """How many pieces of work it has yet to do."""

    def run(self, count: int | None = None) -> None:
        """Do the next `count` pieces of its work; all of it if not given."""


# what happens after work was issued to `stream`, of all `streams`
Schedule = Callable[[Runnable, Sequence[Runnable]], None]


def at_once(stream: Runnable, streams: Sequence[Runnable]) -> None:
    stream.run()


def late(stream: Runnable, streams: Sequence[Runnable]) -> None:
    """Nothing runs until the host waits for it."""


def copies_late(stream: Runnable, streams: Sequence[Runnable]) -> None:
    """Compute streams run at once, copy streams when somebody waits for them."""
    if stream.computes:
        stream.run()


def compute_late(stream: Runnable, streams: Sequence[Runnable]) -> None:
    """Copy streams run at once, compute streams when somebody waits for them."""
    if not stream.computes:
        stream.run()


def random_by(seed: int) -> Schedule:
    """Any stream may come a little further whenever work is issued to any; the same every time for one thread."""
    chance = random.Random(seed)

    def turn(stream: Runnable, streams: Sequence[Runnable]) -> None:
        for _ in range(chance.randint(0, MOST_TURNS)):
            other = chance.choice(streams)
            other.run(min(other.waiting, chance.randint(1, MOST_WORK)))

    return turn


SCHEDULES: dict[str, Schedule] = {
    "at once": at_once,
    "late": late,
    "copies late": copies_late,
    "compute late": compute_late,
}
