"""What the front of a file of tensors says, and keeping it as long as the file stays as it is. Holds no weight."""

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .regular_file import Stamp, open_regular

# headers, and bytes of all that are kept: those of a dozen models, as Python's objects take it
MAX_KEPT, MAX_KEPT_BYTES = 64, 64_000_000
TENSOR_BYTES = 1000  # of a tensor's entry
# what was written just now may be written again without another time: file systems' clocks are as coarse as that
SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class StoredTensor:
    """`nbytes` bytes at `offset` of a file; dtype: safetensors' name or ggml's; shape: rows first."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Tensors by name, texts beside them, and `mark`: what tells this header from every other. `stamp`: the file's
    when it was read. Nobody may write into the tables: they are kept."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    mark: bytes
    stamp: Stamp

    @property
    def kept_bytes(self) -> int:
        texts = sum(len(key) + len(value) for key, value in self.metadata.items())
        return TENSOR_BYTES * (1 + len(self.tensors)) + texts + len(self.mark)


ReadHeader = Callable[[Path, BinaryIO], Header]


class HeaderCache:
    """Headers of files that have not changed since they were read; any number of threads may ask.

    Guarantees: a header is given again only for a file of the same path, number on its disk, size, and times of its
    contents and of its entry there, whose contents had been left alone for two seconds when it was read. Errors are not
    kept, and of headers no more than MAX_KEPT and `max_bytes`: those that were not asked for longest go first.
    """

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: dict[tuple[Path, ReadHeader], tuple[tuple[int, ...], Header]] = {}

    def get(self, file: Path, read: ReadHeader) -> Header:
        """What `read` makes of the file. Raises what it does; OSError as open does; DamagedFile for no regular file."""
        key, seen = (file, read), _seen(file.stat())
        with self._lock:
            kept = self._kept.pop(key, None)
            if kept is not None and kept[0] == seen:
                self._kept[key] = kept  # the last to go
                return kept[1]
        now_ns = time.time_ns()
        with open_regular(file) as stream:
            seen = _seen(os.fstat(stream.fileno()))
            header = read(file, stream)
            changing = _seen(os.fstat(stream.fileno())) != seen  # whose stamp whoever reads its tensors finds wrong
        settled = not changing and header.stamp[1] + SETTLED_NS < now_ns
        if settled and header.kept_bytes <= self._max_bytes:
            with self._lock:
                self._kept[key] = seen, header
                while len(self._kept) > MAX_KEPT or self._kept_bytes() > self._max_bytes:
                    del self._kept[next(iter(self._kept))]
        return header

    def _kept_bytes(self) -> int:
        return sum(header.kept_bytes for _, header in self._kept.values())


def _seen(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
