"""A moment by which all is done. Whoever works asks how many seconds are left."""

import time
from collections.abc import Callable


class Deadline:
    """`seconds` from now on; with `behind`, no later than that."""

    def __init__(
        self, seconds: float, *, behind: "Deadline | None" = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock: Callable[[], float] = behind._clock if behind else clock
        self._end: float = self._clock() + seconds
        if behind is not None:
            self._end = min(self._end, behind._end)

    @property
    def left(self) -> float:
        """Seconds; 0 when it has passed."""
        return max(0.0, self._end - self._clock())
