"""How fast the processes of one image hand numbers to each other. Imports no torch: plans are made from it too."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """sent_bytes: in a second, that each process sends, and receives as many meanwhile; begin_seconds: of an exchange
    of nothing."""

    sent_bytes: float
    begin_seconds: float

    def seconds(self, nbytes: float, exchanges: int) -> float:
        """Of as many exchanges, one after another, of `nbytes` that each process sends in all of them."""
        return nbytes / self.sent_bytes + exchanges * self.begin_seconds


# 10 Gbit/s between machines; where nothing has been measured
TYPICAL_LINK = Link(sent_bytes=1.25e9, begin_seconds=1e-4)
