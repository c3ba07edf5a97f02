"""Facts of this machine in a small file, from run to run. A folder that cannot be written costs what is found again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.atomic_files import whole_file
from ..files.json_texts import read_json
from ..log import logger


class RememberedFacts:
    """JSON by names; entries are the owner's to judge. `file` None: in this object alone. `what`: for the log."""

    def __init__(self, file: Path | None, version: int, what: str) -> None:
        self._file, self._version, self._what = file, version, what
        self._known: dict[str, Any] = {}  # where there is no file

    def read(self) -> dict[str, Any]:
        """Nothing where the file is missing, broken, or of another version."""
        if self._file is None:
            return dict(self._known)
        try:
            known = read_json(self._file)
        except CheckpointError:
            return {}
        return known if known.pop("version", None) == self._version else {}

    def write(self, known: Mapping[str, Any]) -> None:
        """All there is from now on."""
        if self._file is None:
            self._known = dict(known)
            return
        text = json.dumps({"version": self._version, **known}, indent=1)
        try:
            with whole_file(self._file) as stream:
                stream.write(text.encode())
        except OSError as error:
            logger.warning("%s are not remembered: %s cannot be written (%s).", self._what, self._file, error)
