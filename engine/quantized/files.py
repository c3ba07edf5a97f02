"""The folder of quantized weights: files that appear whole or not at all, their list, and clearing it."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from .. import atomic_files
from ..atomic_files import UNFINISHED
from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..errors import CacheError, CheckpointError

SUFFIX = ".safetensors"
MAKER = "qwenimage_lowvram"  # under the metadata key "quantized_by", which tells our files from others


def cache_path(source: Checkpoint, weight_format: str, folder: Path) -> Path:
    """Where the quantized blocks of a source lie: a name that tells the model, the format and the source's identity."""
    path = source.path
    name = path.stem if path.suffix else f"{path.parent.name}-{path.name}"
    name = re.sub(r"[^\w-]", "_", name)[:50]
    return folder / f"{name}.{weight_format}.{source.identity}{SUFFIX}"


@contextmanager
def whole_file(path: Path, *, mtime_s: int) -> Iterator[BinaryIO]:
    """A new file to write to, which takes `path`'s place, with that modification time, when the `with` block ends.

    As `atomic_files.whole_file`, but raises CacheError where the disk is full, or the file may not be written or
    replaced.
    """
    try:
        with atomic_files.whole_file(path, mtime_s=mtime_s) as stream:
            yield stream
    except OSError as error:
        raise _cannot_write(path, error) from error


def remove_dead(folder: Path) -> None:
    """Remove the unfinished files of processes that are no more. Those that are being written stay."""
    atomic_files.remove_dead(_listed(folder, SUFFIX + UNFINISHED))


class State(Enum):
    """What a file of the folder is good for, worded for messages."""

    USABLE = "usable"
    CHANGED = "its model file has changed"
    GONE = "its model file is gone"
    DAMAGED = "damaged"
    UNFINISHED = "being written"


UNUSED = frozenset({State.CHANGED, State.GONE, State.DAMAGED})
FINISHED = UNUSED | {State.USABLE}


@dataclass(frozen=True)
class CachedFile:
    """A file of the folder. `source` is the model file that it was made from, empty where that is unknown."""

    path: Path
    source: str
    weight_format: str
    nbytes: int
    made: float  # seconds since 1970
    state: State


def cached_files(folder: Path) -> list[CachedFile]:
    """The quantized weights in `folder`, by name; files of others are left out. Reads headers only."""
    found = [_described(path) for path in (*_listed(folder, SUFFIX), *_listed(folder, SUFFIX + UNFINISHED))]
    return [file for file in found if file is not None]


def clear(folder: Path, states: Collection[State]) -> list[CachedFile]:
    """Remove the files in those states, and return them; unfinished ones of dead processes go anyway.

    Raises CacheError where one cannot be removed.
    """
    remove_dead(folder)
    removed = []
    for file in cached_files(folder):
        if file.state in states and file.state is not State.UNFINISHED:
            try:
                file.path.unlink(missing_ok=True)
            except OSError as error:
                raise CacheError(
                    f"{file.path} cannot be removed ({error}).\n\nWhat to do: end the run that uses it, then try again."
                ) from error
            removed.append(file)
    return removed


def _described(path: Path) -> CachedFile | None:
    try:
        stat = path.stat()
        if path.suffix == UNFINISHED:
            return CachedFile(path, "", "", stat.st_size, stat.st_mtime, State.UNFINISHED)
        metadata = open_checkpoint(path).metadata
    except OSError:
        return None  # gone meanwhile
    except CheckpointError:
        # nothing tells whose it is but its name
        state = State.DAMAGED if _is_named_as_ours(path) else None
        return CachedFile(path, "", "", stat.st_size, stat.st_mtime, state) if state else None
    if metadata.get("quantized_by") != MAKER:
        return None
    source, weight_format = metadata.get("source", ""), metadata.get("weight_format", "")
    state = _state(Path(source), metadata.get("source_identity", ""))
    return CachedFile(path, source, weight_format, stat.st_size, stat.st_mtime, state)


def _state(source: Path, identity: str) -> State:
    try:
        return State.USABLE if open_checkpoint(source).identity == identity else State.CHANGED
    except CheckpointError:
        return State.CHANGED if source.exists() else State.GONE


def _is_named_as_ours(path: Path) -> bool:
    return re.search(r"\.[0-9a-f]{16}$", path.stem) is not None


def _listed(folder: Path, suffix: str) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(suffix))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(f"{folder} cannot be read ({error}). Check that this user may read it.") from error


def _cannot_write(path: Path, error: OSError) -> CacheError:
    return CacheError(
        f"{path} cannot be written ({error}). Nothing is left of it.\n\n"
        "What to do: free space on that disk, or check that this user may write there; or choose weight_format auto."
    )
