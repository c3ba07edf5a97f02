"""Vector clocks over streams and host threads, and the check of every memory access against them. Knows no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

Site = tuple[str, ...]


class Race(Exception):
    """Two accesses to the same bytes, one of them a write, that nothing orders."""


class Clock(dict[str, int]):
    """How far its owner knows each stream and each host thread to have come: name -> ticks."""

    def join(self, other: "Clock") -> None:
        """From here on the owner comes after all that `other` knows of."""
        for name, ticks in other.items():
            if self.get(name, 0) < ticks:
                self[name] = ticks

    def tick(self, name: str) -> None:
        self[name] = self.get(name, 0) + 1

    def copy(self) -> "Clock":
        return Clock(self)


@dataclass(frozen=True)
class Access:
    """Bytes `begin` to `end` of one allocation, by a stream or a host thread (`who`) at its own tick."""

    begin: int
    end: int
    who: str
    tick: int
    writes: bool
    what: str
    site: Site = ()

    def conflicts(self, other: "Access") -> bool:
        return self.begin < other.end and other.begin < self.end and (self.writes or other.writes)

    def covers(self, other: "Access") -> bool:
        return self.begin <= other.begin and other.end <= self.end

    def __str__(self) -> str:
        how = "writes" if self.writes else "reads"
        return f"{self.who} {how} bytes {self.begin}..{self.end}: {self.what}, {' < '.join(self.site) or 'elsewhere'}"


class AccessLog:
    """The accesses to one allocation that later ones can still conflict with."""

    def __init__(self, memory: str) -> None:
        self.memory = memory
        self._accesses: list[Access] = []

    def add(self, access: Access, clock: Clock) -> Iterator[str]:
        """Remember it; yields a text for each earlier access that conflicts and that `clock`, its owner's, does not
        know of."""
        if access.end <= access.begin:
            return
        kept, races = [], []
        for earlier in self._accesses:
            known = earlier.tick <= clock.get(earlier.who, 0)
            if not known and access.conflicts(earlier):
                races.append(earlier)
            # what is ordered before a write of the same bytes conflicts with nothing that the write does not
            same = not earlier.writes and earlier.who == access.who
            if not (known and access.covers(earlier) and (access.writes or same)):
                kept.append(earlier)
        kept.append(access)
        self._accesses = kept
        for earlier in races:
            yield f"{self.memory}:\n  {earlier}\n  {access}\n  nothing orders them"
