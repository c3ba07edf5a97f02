"""How far one phase of a run is, part by part: a layer, a block, a tile. What is told of it, and how often."""

import time
from enum import Enum

from .surroundings import Surroundings

SECONDS_BETWEEN_EVENTS = 0.25


class Phase(Enum):
    """What may be waited for. The values are what events call it."""

    OPENING = "opening"  # of files
    QUANTIZING = "quantizing"
    ENCODING = "encoding"  # of prompts
    PREPARING = "preparing"  # a run of sampling: what it does before its plan is known
    LOADING = "loading"  # of what stays on the device
    MODULATION = "modulation"
    SAMPLING = "sampling"
    ENCODING_IMAGE = "encoding_image"
    DECODING = "decoding"
    MEASURING = "measuring"  # this machine, for its owner


class Pulse:
    """When something is told: at once where it is another than before or wanted in any case, else so often that nobody
    is flooded with it."""

    def __init__(self) -> None:
        self._last = 0.0
        self.what = ""  # was told of last

    def beats(self, what: str, *, always: bool = False) -> bool:
        """Whether to tell of `what` now; then it is taken for told."""
        now = time.perf_counter()
        if what == self.what and not always and now - self._last < SECONDS_BETWEEN_EVENTS:
            return False
        self._last, self.what = now, what
        return True


class PhaseProgress:
    """Called with (parts done, of how many), before the first part too; moves the program's bar at each, and tells the
    first, the last, and at most four a second of the others. `total` 0: not known yet."""

    def __init__(self, surroundings: Surroundings, phase: Phase) -> None:
        """Begins now, and tells so."""
        self._surroundings, self._phase = surroundings, phase
        self._bar, self._pulse = surroundings.bar(), Pulse()
        self._start = time.perf_counter()
        self._tell(0, 0)

    def __call__(self, done: int, total: int) -> None:
        self._bar(done, total)
        self._tell(done, total)

    def _tell(self, done: int, total: int) -> None:
        if self._pulse.beats(f"of {total}", always=0 < total <= done):
            seconds = time.perf_counter() - self._start
            self._surroundings.tell({"stage": self._phase.value, "done": done, "total": total, "seconds": seconds})
