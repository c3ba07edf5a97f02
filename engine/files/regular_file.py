"""Open files that people give: regular ones only, and unchanged since they were first looked at. Reads nothing."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from ..errors import DamagedFile, MissingFile

# size in bytes and time of the last change in ns: what a file is told apart by from what was put in its place
Stamp = tuple[int, int]

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# opening waits for nobody, not even for the other end of a pipe, and takes no terminal; Windows has no such files
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)


def open_regular(path: Path, *, buffering: int = -1) -> BinaryIO:
    """The file, to be read from. A pipe would hold up whoever opens it, and a device be read for ever.

    Looked at before it is opened, since opening alone may move a device, and again when it is open, since something
    else may have its name by then. Raises DamagedFile for anything but a regular file or a link to one; OSError as open
    does.
    """
    require_regular(path)
    try:
        stream: BinaryIO = open(path, "rb", buffering=buffering, opener=_open_at_once)  # noqa: SIM115
    except OSError:
        require_regular(path)  # a folder or a socket cannot be opened: said in words
        raise
    try:
        _require(path, os.fstat(stream.fileno()).st_mode)
    except BaseException:
        stream.close()
        raise
    return stream


def require_regular(path: Path) -> None:
    """Raises DamagedFile, or OSError where there is nothing."""
    _require(path, path.stat().st_mode)


def stamp_of(stream: BinaryIO) -> Stamp:
    return _stamp(os.fstat(stream.fileno()))


def stamp_of_file(path: Path) -> Stamp:
    """Raises DamagedFile for anything but a regular file or a link to one; OSError where there is nothing."""
    found = path.stat()
    _require(path, found.st_mode)
    return _stamp(found)


def require_unchanged(stream: BinaryIO, path: Path, stamp: Stamp | None) -> None:
    """Raise DamagedFile where the open file is not as it was when its header was read (None: not known)."""
    if stamp is not None:
        _require_same(path, stamp, stamp_of(stream))


def require_all_unchanged(stamps: Mapping[Path, Stamp]) -> None:
    """Raise DamagedFile where one of the files is not as it was, MissingFile where it is gone. Opens none."""
    for path, stamp in stamps.items():
        try:
            now = _stamp(path.stat())
        except OSError as error:
            raise MissingFile(
                "{file} can no longer be read ({error}).", code="file.gone", file=path, error=error
            ) from error
        _require_same(path, stamp, now)


def _open_at_once(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | _AT_ONCE)
    except BlockingIOError:
        # on Linux a file server may have lent the file to somebody, and is asked for it back
        require_regular(Path(path))
        return os.open(path, flags)


def _require(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "something else")
        raise DamagedFile(
            "{file} is {kind}, but a file is needed. Put the model's file there.",
            code="file.not_regular",
            file=path,
            kind=kind,
        )


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_size, found.st_mtime_ns


def _require_same(path: Path, stamp: Stamp, now: Stamp) -> None:
    if now != stamp:
        raise DamagedFile(
            "{file} was changed after it was opened ({size_before} bytes then, {size_now} now): what was read before "
            "and after would not match.\n\nWhat to do: queue the prompt again once the file is complete; the loader "
            "then opens it again.",
            code="file.changed",
            file=path,
            size_before=stamp[0],
            size_now=now[0],
        )
