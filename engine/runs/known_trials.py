"""Remember from run to run how far each kernel's results were from torch's own on this machine."""

from collections.abc import Iterator, MutableMapping
from pathlib import Path

from .remembered import RememberedFacts

VERSION = 1


class KnownTrials(MutableMapping[str, float]):
    """Errors by what was tried, in a file; None: in this object alone."""

    def __init__(self, file: Path | None) -> None:
        self._facts = RememberedFacts(file, VERSION, "Trials of kernels")
        self._known = self._read()

    def __getitem__(self, key: str) -> float:
        return self._known[key]

    def __setitem__(self, key: str, error: float) -> None:
        self._known = {**self._read(), **self._known, key: error}  # another process may have tried others
        self._facts.write(self._known)

    def __delitem__(self, key: str) -> None:
        del self._known[key]
        self._facts.write(self._known)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def _read(self) -> dict[str, float]:
        """Entries that are no numbers left out."""
        return {key: float(value) for key, value in self._facts.read().items() if isinstance(value, (int, float))}
