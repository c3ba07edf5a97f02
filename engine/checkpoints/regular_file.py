"""Open files that people give: regular ones only, and unchanged since they were first looked at. Reads nothing."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..errors import DamagedFile

# size in bytes and time of the last change in ns: what a file is told apart by from what was put in its place
Stamp = tuple[int, int]

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path, *, buffering: int = -1) -> BinaryIO:
    """The file, to be read from. A pipe would hold up whoever opens it, and a device be read for ever.

    Raises DamagedFile for anything but a regular file or a link to one; OSError as open does.
    """
    require_regular(path)
    return path.open("rb", buffering=buffering)


def require_regular(path: Path) -> None:
    """Raises DamagedFile, or OSError where there is nothing."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "something else")
        raise DamagedFile(f"{path} is {kind}, where a file is needed. Put the model's file there.")


def stamp_of(stream: BinaryIO) -> Stamp:
    found = os.fstat(stream.fileno())
    return found.st_size, found.st_mtime_ns


def require_unchanged(stream: BinaryIO, path: Path, stamp: Stamp | None) -> None:
    """Raise DamagedFile where the open file is not as it was when its header was read (None: not known)."""
    if stamp is not None and (now := stamp_of(stream)) != stamp:
        raise DamagedFile(
            f"{path} was changed after it was opened ({stamp[0]} bytes then, {now[0]} now): what was read of it would "
            "not fit together.\n\nWhat to do: queue the prompt again when the file is whole; the loader opens it anew."
        )
