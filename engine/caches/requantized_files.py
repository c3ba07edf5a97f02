"""The folder of quantized weights: files that appear whole or not at all, their list, and clearing it."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from ..errors import CacheError, CheckpointError, MissingFile
from ..files import atomic_files
from ..files.atomic_files import TAG, UNFINISHED, Held, is_file, is_odd
from ..files.checkpoint import Checkpoint, open_checkpoint

SUFFIX = ".safetensors"
MAKER = "qwenimage_lowvram"  # under the metadata key "quantized_by", which tells our files from others
MOST_NAME_BYTES = 150  # of the model's name in ours: file systems take 255, and an unfinished file's has 65 more
PATIENCE_SECONDS = 10.0  # for a virus scanner: what is given up took minutes to make

_OUR_NAME = re.compile(rf".+\.[0-9a-f]{{16}}(\.{TAG}{SUFFIX}{UNFINISHED}|{SUFFIX})", re.DOTALL)


def cache_path(source: Checkpoint, weight_format: str, folder: Path) -> Path:
    """Where the quantized blocks of a source lie: a name that tells the model, the format and the source's identity."""
    path = source.path
    name = path.stem if path.suffix else f"{path.parent.name}-{path.name}"
    name = re.sub(r"[^\w-]", "_", name)[:50]
    name = name.encode()[:MOST_NAME_BYTES].decode(errors="ignore")
    return folder / f"{name}.{weight_format}.{source.identity}{SUFFIX}"


@contextmanager
def whole_file(path: Path, *, mtime_s: int) -> Iterator[BinaryIO]:
    """A new file to write to, which takes `path`'s place, with that modification time, when the `with` block ends.

    As `atomic_files.whole_file`, but raises CacheError where the disk is full, or the file may not be written or
    replaced.
    """
    try:
        with atomic_files.whole_file(path, mtime_s=mtime_s, patience_s=PATIENCE_SECONDS) as stream:
            yield stream
    except Held as error:
        raise _is_held(path, error) from error
    except FileExistsError as error:
        raise _is_in_the_way(path) from error
    except OSError as error:
        raise _cannot_write(path, error) from error


def require_place(path: Path) -> None:
    """Raise CacheError where something that is no plain file has that name, and would be in the way of the file."""
    if is_odd(path):
        raise _is_in_the_way(path)


def remove_dead(folder: Path) -> None:
    """Remove the unfinished files of processes that are no more. Those that are being written stay."""
    atomic_files.remove_dead(path for path in _listed(folder, SUFFIX + UNFINISHED) if _OUR_NAME.fullmatch(path.name))


class State(Enum):
    """What a file of the folder is good for, worded for messages."""

    USABLE = "usable"
    CHANGED = "its model file has changed"
    GONE = "its model file is gone"
    DAMAGED = "damaged"
    UNFINISHED = "being written"
    UNREADABLE = "cannot be read, left alone"
    FOREIGN = "not this pack's file, left alone"


UNUSED = frozenset({State.CHANGED, State.GONE, State.DAMAGED})
FINISHED = UNUSED | {State.USABLE}


@dataclass(frozen=True)
class CachedFile:
    """A file of the folder, or what stands where one could. `source` is the model file that it was made from, empty
    where that is unknown. Texts are as the file has them, and may hold anything.
    """

    path: Path
    source: str
    weight_format: str
    nbytes: int
    made: float  # seconds since 1970
    state: State


@dataclass(frozen=True)
class Cleared:
    """The files that are removed, and those that could not be, with the reason."""

    removed: tuple[CachedFile, ...]
    failed: tuple[tuple[CachedFile, str], ...]


def cached_files(folder: Path) -> list[CachedFile]:
    """The quantized weights in `folder`, by name, and what has such a name without being one; other files of others
    are left out. Reads headers only."""
    found = [_described(path) for path in (*_listed(folder, SUFFIX), *_listed(folder, SUFFIX + UNFINISHED))]
    return [file for file in found if file is not None]


def clear(folder: Path, states: Collection[State]) -> Cleared:
    """Remove the finished files of ours in those states, and say which went; unfinished ones of dead processes go
    anyway. Goes on after one that cannot be removed. Raises CacheError where the folder cannot be read.
    """
    remove_dead(folder)
    files = {file.path: file for file in cached_files(folder) if file.state in FINISHED.intersection(states)}
    done = atomic_files.remove(files)
    return Cleared(
        tuple(files[path] for path in done.gone), tuple((files[path], why) for path, why in done.failed.items())
    )


def _described(path: Path) -> CachedFile | None:
    """None for a whole file of others, and for one that has gone meanwhile."""
    try:
        stat = path.lstat()
    except OSError:
        return None
    named_as_ours = _OUR_NAME.fullmatch(path.name) is not None

    def told(state: State, source: str = "", weight_format: str = "") -> CachedFile:
        return CachedFile(path, source, weight_format, stat.st_size, stat.st_mtime, state)

    if not is_file(path):  # never opened: opening a pipe waits for its other end
        return told(State.FOREIGN)
    if path.suffix == UNFINISHED:
        return told(State.UNFINISHED if named_as_ours else State.FOREIGN)
    try:
        metadata = open_checkpoint(path).metadata
    except MissingFile:
        return told(State.UNREADABLE) if is_file(path) and named_as_ours else None
    except (CheckpointError, OSError, ValueError):
        return told(State.DAMAGED) if named_as_ours else None  # nothing tells whose it is but its name
    if metadata.get("quantized_by") != MAKER:
        return None
    source, weight_format = metadata.get("source", ""), metadata.get("weight_format", "")
    return told(_state(source, metadata.get("source_identity", "")), source, weight_format)


def _state(source: str, identity: str) -> State:
    """Of a file that was made from that source. The text may be anything: a path with a NUL, of a pipe, too long."""
    path = Path(source)
    try:
        if not (path.is_file() or path.is_dir()):
            return State.GONE
        return State.USABLE if open_checkpoint(path).identity == identity else State.CHANGED
    except CheckpointError:
        return State.CHANGED
    except (OSError, ValueError):
        return State.GONE


def _listed(folder: Path, suffix: str) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(suffix))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(
            "{file} cannot be read ({error}). Check that your user account may read it.",
            code="file.unreadable",
            file=folder,
            error=error,
        ) from error


def _is_held(path: Path, error: OSError) -> CacheError:
    return CacheError(
        "{file} was written completely, but another program is using it, as virus scanners do ({error}). Nothing is "
        "left of it.\n\nWhat to do: exclude that folder from the scanner, close the other programs that use it, or "
        "check that your user account may replace files there; then queue the prompt again, or choose weight_format "
        "auto.",
        code="weight_cache.held",
        file=path,
        error=error,
    )


def _is_in_the_way(path: Path) -> CacheError:
    return CacheError(
        "{file} is a folder, a link or something else that is not a plain file, but quantized weights are to be "
        "written there. It is left as it is.\n\nWhat to do: move it away, or choose weight_format auto.",
        code="weight_cache.in_the_way",
        file=path,
    )


def _cannot_write(path: Path, error: OSError) -> CacheError:
    return CacheError(
        "{file} cannot be written ({error}). Nothing is left of it.\n\nWhat to do: free space on that disk, or check "
        "that your user account may write there, or choose weight_format auto.",
        code="weight_cache.not_written",
        file=path,
        error=error,
    )
