"""Where the bytes of blocks come from: the user's own files. Never keeps a second copy."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from ..checkpoint import TensorEntry
from ..errors import DamagedFile, MissingFile
from .layout import StoredBlock, store_block


class BlockSource(Protocol):
    """Fills host buffers with blocks' raw bytes. `read` is called from one thread at a time."""

    def read(self, index: int, out: Tensor) -> None:
        """Write the raw bytes of block `index` into `out` (uint8, on the host, at least raw.nbytes long)."""

    def close(self) -> None:
        """Close what is open; a later read opens it again."""


class TensorReader:
    """Reads tensors' bytes from their files through handles that it keeps open until `close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handles: dict[Path, BinaryIO] = {}

    def read_into(self, entry: TensorEntry, out: memoryview, *, skip: int = 0) -> None:
        """Fill `out` from byte `skip` of the tensor on. Raises MissingFile, or DamagedFile where the file ends."""
        if entry.data is not None:
            out[:] = entry.data[skip : skip + len(out)]
            return
        with self._lock:
            try:
                handle = self._handles.get(entry.file)
                if handle is None:
                    handle = self._handles[entry.file] = entry.file.open("rb", buffering=0)
                handle.seek(entry.offset + skip)
                done = 0
                while done < len(out):
                    count = handle.readinto(out[done:])  # type: ignore[attr-defined]
                    if not count:
                        raise DamagedFile(
                            f"{entry.file} ends {len(out) - done} bytes early: it was changed or cut off after it was "
                            "opened. Load the model again, or download it again."
                        )
                    done += count
            except OSError as error:
                raise MissingFile(f"{entry.file} cannot be read any more ({error}).") from error

    def close(self) -> None:
        with self._lock:
            for handle in self._handles.values():
                handle.close()
            self._handles.clear()


class FileSource:
    """Blocks read tensor by tensor, in the order in which they lie in the file."""

    def __init__(self, blocks: Sequence[StoredBlock]) -> None:
        self._reader = TensorReader()
        self._reads = []
        for block in blocks:
            parts = [part for param in block.params for part in param.parts]
            pairs = zip(parts, block.raw.items, strict=True)
            self._reads.append(sorted(pairs, key=lambda pair: (str(pair[0].file), pair[0].offset)))

    def read(self, index: int, out: Tensor) -> None:
        memory = memoryview(out.numpy())
        for entry, item in self._reads[index]:
            self._reader.read_into(entry, memory[item.offset : item.offset + item.nbytes])

    def close(self) -> None:
        self._reader.close()


def read_params(
    tensors: Mapping[str, TensorEntry],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    where: str,
    make_source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource,
) -> dict[str, Tensor]:
    """Read and decode some parameters (name -> shape) to the host at once. For small sets of weights only.

    Raises WrongModel for a parameter that is missing or has another shape; `where` names the file.
    """
    block = store_block(shapes, tensors, dtype, where)
    source = make_source([block])
    with torch.inference_mode(False):
        raw = torch.empty(block.raw.nbytes, dtype=torch.uint8)
        slot = raw if block.native else torch.empty(block.slot.nbytes, dtype=torch.uint8)
    try:
        source.read(0, raw)
    finally:
        source.close()
    if not block.native:
        block.decode(raw, slot)
    return block.slot.views(slot)
