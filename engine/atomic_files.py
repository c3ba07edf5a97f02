"""Files that appear whole or not at all, also where several processes write the same one, or one is killed."""

import os
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".part"  # behind the name of a file that is being written
SECONDS_PER_DAY = 86400

if sys.platform == "win32":

    def _locks(stream: BinaryIO) -> bool:
        return True  # a file that somebody has open cannot be removed there, which is lock enough

else:
    import fcntl

    def _locks(stream: BinaryIO) -> bool:
        """Take the file for this process, until it is closed; the system lets go of it when a process is killed."""
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a disk without locks
            return time.time() - os.fstat(stream.fileno()).st_mtime > SECONDS_PER_DAY
        return True


@contextmanager
def whole_file(path: Path, *, mtime_s: int | None = None) -> Iterator[BinaryIO]:
    """A new file to write to, which takes `path`'s place, with that modification time (None: now), when the `with`
    block ends.

    On every other way out it is removed; what a killed process leaves is another name, which nobody reads and
    `remove_dead` removes. Several processes may do this at once: the last one's file stays. Raises OSError where the
    disk is full, or the file may not be written or replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, stream = _claim(path)
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if sys.platform != "win32":  # while the lock is held
                _publish(part, path, mtime_s)
        if sys.platform == "win32":  # where an open file cannot be renamed
            _publish(part, path, mtime_s)
    except BaseException:
        _remove(part)
        raise


def remove_dead(parts: Iterable[Path]) -> None:
    """Remove those unfinished files whose processes are no more. Those that are being written stay."""
    for part in parts:
        if _is_dead(part):
            _remove(part)


def _claim(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `path` that this process holds the lock of."""
    while True:
        part = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}{UNFINISHED}")
        stream = part.open("xb")
        _locks(stream)
        try:
            if part.stat().st_ino == os.fstat(stream.fileno()).st_ino:
                return part, stream
        except FileNotFoundError:
            pass  # taken for a dead one and removed before it was locked
        stream.close()


def _publish(part: Path, path: Path, mtime_s: int | None) -> None:
    if mtime_s is not None:
        os.utime(part, (mtime_s, mtime_s))
    os.replace(part, path)


def _is_dead(part: Path) -> bool:
    try:
        with part.open("r+b") as stream:
            return _locks(stream)
    except OSError:
        return False


def _remove(part: Path) -> None:
    with suppress(PermissionError):  # Windows: somebody has it open; the next one to come removes it
        part.unlink(missing_ok=True)
