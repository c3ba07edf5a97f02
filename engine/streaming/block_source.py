"""Where the bytes of blocks come from: the user's own files. Never keeps a second copy."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from ..errors import DamagedFile, MissingFile
from ..files.checkpoint import TensorEntry
from ..files.regular_file import open_regular, require_unchanged
from .block_layout import StoredBlock, WeightPatch, store_block


class BlockSource(Protocol):
    """Fills host buffers with blocks' raw bytes. `read` may be called from several threads at a time."""

    def read(self, index: int, out: Tensor, start: int = 0) -> None:
        """Fill `out` (uint8, on the host) with the raw bytes of block `index` from byte `start` on."""

    def close(self) -> None:
        """Close what is open, while no read is under way; a later read opens it again."""


class TensorReader:
    """Reads tensors' bytes from their files through handles that it keeps open until `close`, one for each thread
    that reads at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[Path, list[BinaryIO]] = {}

    def read_into(self, entry: TensorEntry, out: memoryview, *, skip: int = 0) -> None:
        """Fill `out` from byte `skip` of the tensor on. Raises MissingFile, or DamagedFile where the file ends, or is
        not the one any more whose header was read."""
        if entry.data is not None:
            out[:] = entry.data[skip : skip + len(out)]
            return
        if entry.parts:
            for part, begin, at, count in _runs(entry, skip, len(out)):
                self.read_into(part, out[at : at + count], skip=begin)
            return
        try:
            with self._handle(entry) as handle:
                handle.seek(entry.offset + skip)
                done = 0
                while done < len(out):
                    count = handle.readinto(out[done:])  # type: ignore[attr-defined]
                    if not count:
                        raise DamagedFile(
                            "{file} ends {lacking} bytes early: it was changed or truncated after it was opened. Load "
                            "the model again, or download it again.",
                            code="file.ends_early",
                            file=entry.file,
                            lacking=len(out) - done,
                        )
                    done += count
                require_unchanged(handle, entry.file, entry.stamp)  # behind the read: what was read is the file's
        except OSError as error:
            raise MissingFile(
                "{file} can no longer be read ({error}).", code="file.gone", file=entry.file, error=error
            ) from error

    def close(self) -> None:
        with self._lock:
            for handles in self._idle.values():
                for handle in handles:
                    handle.close()
            self._idle.clear()

    @contextmanager
    def _handle(self, entry: TensorEntry) -> Iterator[BinaryIO]:
        file = entry.file
        with self._lock:
            idle = self._idle.get(file)
            handle = idle.pop() if idle else None
        if handle is None:
            handle = open_regular(file, buffering=0)
        try:
            yield handle
        finally:
            with self._lock:
                self._idle.setdefault(file, []).append(handle)


def _runs(entry: TensorEntry, skip: int, count: int) -> Iterator[tuple[TensorEntry, int, int, int]]:
    """Where `count` bytes of a tensor in pieces lie, from byte `skip` on: (piece, byte in it, place in the result,
    number of bytes)."""
    done = 0
    while done < count:
        turn, within = divmod(skip + done, entry.run_bytes)
        nbytes = min(entry.run_bytes - within, count - done)
        begin = turn // len(entry.parts) * entry.run_bytes + within
        yield entry.parts[turn % len(entry.parts)], begin, done, nbytes
        done += nbytes


class FileSource:
    """Blocks read tensor by tensor, in the order in which they lie in the file."""

    def __init__(self, blocks: Sequence[StoredBlock]) -> None:
        self._reader = TensorReader()
        self._reads = []
        for block in blocks:
            pairs = zip(block.parts, block.raw.items, strict=True)
            self._reads.append(sorted(pairs, key=lambda pair: (str(pair[0].file), pair[0].offset)))

    def read(self, index: int, out: Tensor, start: int = 0) -> None:
        memory = memoryview(out.numpy())
        end = start + len(memory)
        for entry, item in self._reads[index]:
            first, last = max(start, item.offset), min(end, item.end)
            if first < last:
                self._reader.read_into(entry, memory[first - start : last - start], skip=first - item.offset)

    def close(self) -> None:
        self._reader.close()


def read_params(
    tensors: Mapping[str, TensorEntry],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    where: str,
    make_source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource,
    patches: Sequence[WeightPatch] = (),
) -> dict[str, Tensor]:
    """Read, decode and patch some parameters (name -> shape) on the host at once. For small sets of weights only.

    Raises WrongModel for a parameter that is missing or has another shape; `where` names the file.
    """
    return read_block(store_block(shapes, tensors, dtype, where, patches), make_source)


def read_block(
    block: StoredBlock, make_source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource
) -> dict[str, Tensor]:
    """The same of a block: its parameters by name, decoded but for those that layers compute on as they are stored."""
    source = make_source([block])
    with torch.inference_mode(False):
        raw = torch.empty(block.raw.nbytes, dtype=torch.uint8)
        slot = raw if block.native and not block.patches else torch.empty(block.slot.nbytes, dtype=torch.uint8)
    try:
        source.read(0, raw)
    finally:
        source.close()
    if slot is not raw:
        if block.native:
            slot.copy_(raw[: block.slot.nbytes])
        scratch = torch.empty(block.scratch_bytes(on_host=True), dtype=torch.uint8)
        for group in block.groups:
            group.decode(raw, slot, scratch)
    return block.slot.views(slot)
