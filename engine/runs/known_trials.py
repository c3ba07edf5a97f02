"""Remember from run to run how far each kernel's results were from torch's own on this machine."""

import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from ..errors import CheckpointError
from ..files.atomic_files import whole_file
from ..files.json_texts import read_json
from ..log import logger

VERSION = 1


class KnownTrials(MutableMapping[str, float]):
    """Errors by what was tried, in a file; None: in this object alone. A folder that cannot be written costs a trial
    the next time."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._known = self._read()

    def __getitem__(self, key: str) -> float:
        return self._known[key]

    def __setitem__(self, key: str, error: float) -> None:
        self._known = {**self._read(), **self._known, key: error}  # another process may have tried others
        self._write()

    def __delitem__(self, key: str) -> None:
        del self._known[key]
        self._write()

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def _write(self) -> None:
        if self._file is None:
            return
        text = json.dumps({"version": VERSION, **self._known}, indent=1)
        try:
            with whole_file(self._file) as stream:
                stream.write(text.encode())
        except OSError as error:
            logger.warning("Trials of kernels are not remembered: %s cannot be written (%s).", self._file, error)

    def _read(self) -> dict[str, float]:
        """Entries that are no numbers left out."""
        if self._file is None:
            return {}
        try:
            known = read_json(self._file)
        except CheckpointError:
            return {}
        if known.pop("version", None) != VERSION:
            return {}
        return {key: float(value) for key, value in known.items() if isinstance(value, (int, float))}
