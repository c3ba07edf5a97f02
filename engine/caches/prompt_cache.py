"""Embeddings of prompts on disk: what was encoded once needs no text encoder again. Never changes a result."""

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import CacheError, DamagedFile, MissingFile
from ..files.atomic_files import TAG, UNFINISHED, is_odd, remove, remove_dead, whole_file
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..formats import TORCH_DTYPES
from ..log import logger
from ..streaming import TensorReader
from .prompt_key import PromptKey

LIMIT_BYTES = 1_000_000_000  # the longest prompt of the reference takes 4 MB in bf16, a usual one 0.7 MB
SUFFIX = ".safetensors"
NAME = "embeddings"  # of an entry's only tensor

_OURS = re.compile(rf"[0-9a-f]{{32}}(\.{TAG}{SUFFIX}{UNFINISHED}|{SUFFIX})")


@dataclass(frozen=True)
class Entry:
    """A file of the folder, whole or being written."""

    path: Path
    nbytes: int
    used_ns: int  # when it was read or written last

    @property
    def is_whole(self) -> bool:
        return self.path.suffix == SUFFIX


@dataclass(frozen=True)
class Cleared:
    """The entries that are removed, and those that could not be, with the reason."""

    removed: tuple[Entry, ...]
    failed: tuple[tuple[Entry, str], ...]


class PromptCache:
    """A folder of embeddings, `limit_bytes` of files at most; those that were not used for longest go first.

    Guarantees: `get` gives what `put` was given for that key, bit for bit, or None. An entry that is damaged or holds
    anything else is removed, with a warning. What is no plain file (a folder, a link, a pipe) is never opened, counted
    or removed, whatever its name. A disk that is full, or a folder that may not be read or written, costs
    a warning, never the run. Several processes may use the folder at once: entries appear whole or not at all, and
    what processes that write at the same moment have beyond the limit goes before the last of them is done.
    """

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        """Touches nothing; the folder is made for the first entry."""
        self.folder = folder
        self.limit_bytes = limit_bytes

    def get(self, key: PromptKey) -> Tensor | None:
        """The embeddings kept for that key, on the host, in the shape and dtype they were given in."""
        path = self._path(key)
        if is_odd(path):
            logger.warning("A prompt is encoded again: %s is not a plain file. It is left alone.", path)
            return None
        if not os.path.exists(path):  # Path.exists would raise where the folder may not be entered
            return None
        try:
            tensor = _read(path, key)
        except DamagedFile:
            logger.warning("%s is damaged or not what was kept. It is removed, and its prompt encoded again.", path)
            with suppress(OSError):  # the new one takes its place
                path.unlink()
            return None
        except (MissingFile, OSError) as error:
            if os.path.exists(path):  # or another process has just removed it
                logger.warning("A prompt is encoded again: %s", error)
            return None
        with suppress(OSError):  # a folder that is not ours to write: its order stays
            os.utime(path)
        return tensor

    def put(self, key: PromptKey, tensor: Tensor) -> None:
        """Keep a key's embeddings, where there is room for them within the limit.

        Numbers that are not finite are not kept: they are an accident of the computation.
        """
        if not torch.isfinite(tensor).all():
            return
        path = self._path(key)
        data = _written(key, tensor)
        if len(data) > self.limit_bytes:
            logger.warning("A prompt is not kept: it takes %d bytes, the limit is %d.", len(data), self.limit_bytes)
            return
        try:
            if not self._make_room(len(data)):
                logger.warning("A prompt is not kept: %s is full, and its files cannot be removed.", self.folder)
                return
            with whole_file(path) as stream:
                stream.write(data)
            self._make_room(0)
        except OSError as error:
            if not os.path.exists(path):  # or another process was faster and has it open
                logger.warning("A prompt is not kept: %s cannot be written (%s).", path, error)

    def entries(self) -> list[Entry]:
        """What is there, the least recently used first. Raises CacheError where the folder cannot be read."""
        try:
            return [entry for entry in self._files() if entry.is_whole]
        except OSError as error:
            raise CacheError(
                "{file} cannot be read ({error}). Check that your user account may read it.",
                code="file.unreadable",
                file=self.folder,
                error=error,
            ) from error

    def odd_names(self) -> list[str]:
        """What has an entry's name and is no plain file: it is left alone. Nothing where the folder cannot be read."""
        try:
            names = sorted(os.listdir(self.folder))
        except OSError:
            return []
        return [name for name in names if _OURS.fullmatch(name) and is_odd(self.folder / name)]

    def clear(self) -> Cleared:
        """Remove every entry, and say which went. Goes on after one that cannot be removed.

        Raises CacheError where the folder cannot be read.
        """
        try:
            entries = {entry.path: entry for entry in self._files_of_the_living() if entry.is_whole}
        except OSError as error:
            raise CacheError(
                "{folder} cannot be cleared ({error}).\n\nWhat to do: check that your user account may read it.",
                code="prompt_cache.not_cleared",
                folder=self.folder,
                error=error,
            ) from error
        done = remove(entries)
        return Cleared(
            tuple(entries[path] for path in done.gone), tuple((entries[path], why) for path, why in done.failed.items())
        )

    def _path(self, key: PromptKey) -> Path:
        return self.folder / f"{key.digest}{SUFFIX}"

    def _make_room(self, nbytes: int) -> bool:
        """Remove the entries that were not used for longest until `nbytes` more are within the limit."""
        entries = self._files_of_the_living()
        held = sum(entry.nbytes for entry in entries)
        for entry in entries:
            if held + nbytes <= self.limit_bytes:
                break
            if entry.is_whole:
                with suppress(OSError):  # Windows: somebody reads it
                    entry.path.unlink(missing_ok=True)
                    held -= entry.nbytes
        return held + nbytes <= self.limit_bytes

    def _files_of_the_living(self) -> list[Entry]:
        """Without what killed processes left, which is removed."""
        parts = [entry.path for entry in self._files() if not entry.is_whole]
        remove_dead(parts)
        return self._files()

    def _files(self) -> list[Entry]:
        """The least recently used first; files of others in the folder are left out, and what is no file."""
        found = []
        try:
            listed = list(os.scandir(self.folder))
        except FileNotFoundError:
            return []
        for item in listed:
            if _OURS.fullmatch(item.name):
                with suppress(OSError):  # gone meanwhile
                    if not item.is_file(follow_symlinks=False):
                        continue
                    stat = item.stat(follow_symlinks=False)
                    found.append(Entry(Path(item.path), stat.st_size, stat.st_mtime_ns))
        return sorted(found, key=lambda entry: (entry.used_ns, entry.path.name))


def _written(key: PromptKey, tensor: Tensor) -> bytes:
    """The file: in fewer bytes than the tensor's dtype takes, where those hold the same numbers."""
    held = _narrow(tensor.detach().cpu().contiguous())
    given = _dtype_name(tensor.dtype)
    header = {"key": key.text, "dtype": given, "checksum": _checksum(key, given, held)}
    return save({NAME: held}, metadata=header)


def _read(path: Path, key: PromptKey) -> Tensor:
    """Raises DamagedFile where the file is not what was written for that key, MissingFile where it cannot be read."""
    file = open_checkpoint(path)
    if file.metadata.get("key") != key.text or set(file.tensors) != {NAME}:
        raise DamagedFile(
            "{file} holds something other than its name says.", code="prompt_cache.other_contents", file=path
        )
    held = _data(file)
    given = file.metadata.get("dtype", "")
    if file.metadata.get("checksum") != _checksum(key, given, held):
        raise DamagedFile(
            "{file} is damaged: its data is not what was written.", code="prompt_cache.changed_data", file=path
        )
    return held.to(TORCH_DTYPES[given])


def _data(file: Checkpoint) -> Tensor:
    entry = file.tensors[NAME]
    if entry.dtype not in TORCH_DTYPES:
        raise DamagedFile(
            "{file} is damaged: it holds {dtype}.", code="prompt_cache.other_dtype", file=file.path, dtype=entry.dtype
        )
    out = torch.empty(entry.nbytes, dtype=torch.uint8)
    entry = replace(entry, stamp=None)  # another process may set its time, which tells when it was used
    reader = TensorReader()
    try:
        reader.read_into(entry, memoryview(out.numpy()))
    finally:
        reader.close()
    return out.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)


def _narrow(tensor: Tensor) -> Tensor:
    """fp32 numbers that a 16-bit dtype has too, as those of an encoder that computes in it, in that dtype."""
    if tensor.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            narrow = tensor.to(dtype)
            if torch.equal(narrow.float().view(torch.int32), tensor.view(torch.int32)):
                return narrow
    return tensor


def _checksum(key: PromptKey, given: str, held: Tensor) -> str:
    digest = hashlib.sha256(f"{key.text} {given} {_dtype_name(held.dtype)} {list(held.shape)} ".encode())
    digest.update(held.view(torch.uint8).numpy())
    return digest.hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in TORCH_DTYPES.items() if known == dtype)
