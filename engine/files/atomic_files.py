"""Files that appear whole or not at all, also where several processes write the same one, or one is killed."""

import errno
import os
import platform
import re
import stat
import sys
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".part"  # behind the name of a file that is being written
# before its suffix: the machine that writes it, and a number of its own (older releases named no machine)
TAG = r"(?:[0-9a-f]{8}-)?[0-9a-f]{8}"
SECONDS_PER_DAY = 86400
CLAIMS = 20  # a name can only be lost in the moment before it is locked: more than two in a row are no accident
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.05, 1.0  # between two attempts to replace a file


class Held(PermissionError):
    """A file was written whole, but another program has it, or the one it replaces, open. Only Windows minds."""


@dataclass(frozen=True)
class Removed:
    """What `remove` did: the files that are no more, and why others could not be removed."""

    gone: tuple[Path, ...]
    failed: dict[Path, str]


if sys.platform == "win32":

    def _lock(stream: BinaryIO) -> bool | None:
        return True  # a file that somebody has open cannot be removed there, which is lock enough

else:
    import fcntl

    def _lock(stream: BinaryIO) -> bool | None:
        """Take the file for this process, until it is closed; the system lets go of it when a process is killed.

        False where another has it, None on a disk without locks.
        """
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True


@contextmanager
def whole_file(path: Path, *, mtime_s: int | None = None, patience_s: float = 1.0) -> Iterator[BinaryIO]:
    """A new file to write to, which takes `path`'s place, with that modification time (None: now), when the `with`
    block ends.

    On every other way out it is removed; what a killed process leaves is another name, which nobody reads and
    `remove_dead` removes. Several processes may do this at once: the last one's file stays. Raises OSError where the
    disk is full, the file may not be written or replaced, or something that is no file (a folder, a link, a pipe) has
    its name; Held where another program has it open for longer than `patience_s`, as virus scanners do on Windows.
    """
    _require_file_or_nothing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, stream = _claim(path)
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if sys.platform != "win32":  # while the lock is held
                _publish(part, path, mtime_s, patience_s)
        if sys.platform == "win32":  # where an open file cannot be renamed
            _publish(part, path, mtime_s, patience_s)
    except BaseException:
        _remove(part)
        raise


def may_write(folder: Path) -> bool:
    """Whether files can be made in `folder`, or, where it is not there, above it. Tried: no system tells beforehand."""
    there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    probe = there / f"{uuid.uuid4().hex}{UNFINISHED}"
    try:
        probe.open("xb").close()
    except OSError:
        return False
    _remove(probe)
    return True


def is_file(path: Path) -> bool:
    """Whether a plain file lies there: no link, folder, pipe, socket or device. False where that cannot be seen."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def is_odd(path: Path) -> bool:
    """Whether something lies there that is no plain file. One look: a file that goes meanwhile is none."""
    try:
        return not stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def remove(paths: Iterable[Path]) -> Removed:
    """Remove those files; goes on after one that cannot be removed. One that is gone already counts as removed."""
    gone: list[Path] = []
    failed: dict[Path, str] = {}
    for path in paths:
        try:
            path.unlink(missing_ok=True)
            gone.append(path)
        except OSError as error:
            failed[path] = error.strerror or str(error)
    return Removed(tuple(gone), failed)


def remove_dead(parts: Iterable[Path]) -> None:
    """Remove those unfinished files whose processes are no more. Those that are being written stay, and what is not a
    file, or cannot be removed.

    A lock tells for files of this machine, on a disk that has locks. Network drives often keep locks on one machine,
    so a file of another one, or on a disk without locks, is dead a day after it was last written to.
    """
    for part in parts:
        if _is_dead(part):
            _remove(part)


def _require_file_or_nothing(path: Path) -> None:
    if is_odd(path):
        raise FileExistsError(
            errno.EEXIST, "something that is not a plain file has this name; it is left alone", str(path)
        )


def _claim(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `path` that this process holds the lock of."""
    for _ in range(CLAIMS):
        part = path.with_name(f"{path.stem}.{_this_machine()}-{uuid.uuid4().hex[:8]}{path.suffix}{UNFINISHED}")
        stream = part.open("xb")
        # Nobody else makes a file of this name: where it is still there, it is this one. Numbers of files are not
        # compared, network drives give two to one file.
        if _lock(stream) is not False and part.exists():
            return part, stream
        stream.close()  # taken for a dead one, and removed, before it was locked
        _remove(part)
    raise OSError(
        errno.EBUSY, f"{CLAIMS} new files were removed by another program as soon as they were made", str(path)
    )


def _publish(part: Path, path: Path, mtime_s: int | None, patience_s: float) -> None:
    if mtime_s is not None:
        os.utime(part, (mtime_s, mtime_s))
    deadline, wait_s = time.monotonic() + patience_s, FIRST_WAIT_SECONDS
    while True:
        try:
            return os.replace(part, path)
        except PermissionError as error:
            if time.monotonic() + wait_s > deadline:
                raise Held(error.errno, f"{error.strerror}; it was whole, and tried for {patience_s:.0f} s") from error
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_SECONDS)


def _is_dead(part: Path) -> bool:
    if not is_file(part):
        return False
    try:
        with part.open("r+b") as stream:
            locked = _lock(stream)
            if locked is False or (locked and _is_of_this_machine(part)):
                return locked
            return time.time() - os.fstat(stream.fileno()).st_mtime > SECONDS_PER_DAY
    except OSError:
        return False


@cache
def _this_machine() -> str:
    """8 hex digits of its name and network card; a container has its own."""
    return f"{zlib.crc32(f'{platform.node()} {uuid.getnode()}'.encode()):08x}"


def _is_of_this_machine(part: Path) -> bool:
    """Also where nothing says which one's it is, as in older releases' names."""
    tag = re.search(rf"\.([0-9a-f]{{8}})-[0-9a-f]{{8}}\.[^.]*{re.escape(UNFINISHED)}$", part.name)
    return tag is None or tag[1] == _this_machine()


def _remove(part: Path) -> None:
    with suppress(OSError):  # Windows: somebody has it open; the next one to come removes it
        part.unlink(missing_ok=True)
