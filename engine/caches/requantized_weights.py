"""Quantize a transformer's blocks once, into a cache file, and open them from it. Holds one matrix at a time.

Of each block, the matrices of attention and MLPs are quantized. Everything outside the blocks stays as its file has
it (in 4 bits it would make most of the error), and so does modulation, whose weights are read once per run.
"""

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheError, CheckpointError, DamagedFile, InvalidRequest, MissingFile
from ..files.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from ..files.regular_file import Stamp, open_regular, require_unchanged
from ..formats import TORCH_DTYPES, StoredParam, described_tensors, stored_param
from ..formats.chunks import CHUNK_WEIGHTS
from ..formats.file_parts import Part
from ..log import logger
from ..models.families import family_of
from ..models.recognition import require
from ..models.sorting import sort_blocks
from ..streaming import TensorReader
from ..texts import printable
from .requantized_files import MAKER, cache_path, remove_dead, require_place, whole_file
from .requantized_layout import FORMATS, UNQUANTIZED, Matrix, quantized_matrix

VERSION = "1"  # of what is written here; files of another are made again

OnBlock = Callable[[int, int], None]

_FREE_BYTES = 256 * 1024**2  # left on the disk
# bitsandbytes' kernel for the CPU makes copies of a chunk: fp32, its absolute, its scaled values, indices and codes
_SCRATCH_BYTES = 24 * CHUNK_WEIGHTS
_READ_BYTES = 8 * 1024**2


@dataclass(frozen=True)
class RequantizedWeights:
    """The quantized blocks of one source in one format, in a file of the cache folder that may yet have to be made.

    The file is a safetensors file in bitsandbytes' layout (int8, nf4, fp4) or ComfyUI's (scaled fp8). It is believed
    only where its header is the one that this source calls for, and its data is what was written.
    """

    source: Checkpoint
    weight_format: str
    path: Path
    blocks: tuple[tuple[Matrix, ...], ...] = field(repr=False)

    @classmethod
    def of(cls, source: Checkpoint, weight_format: str, folder: Path) -> "RequantizedWeights | None":
        """None where the source stores its blocks in that format already. Reads no weight.

        Raises InvalidRequest where they are in another quantized format, WrongModel where it is no transformer.
        """
        family = family_of(source)
        require(source, family.transformer)
        where, begin = str(source.path), family.block_prefix
        prefix = next(name.partition(begin)[0] for name in source.tensors if begin in name) + begin
        quantizable = re.compile(family.quantizable).fullmatch
        blocks = [
            [
                stored_param(name, block, where)
                for name, entry in block.items()
                if len(entry.shape) == 2 and quantizable(name)
            ]
            for block in sort_blocks(source, described_tensors(source), prefix)[1]
        ]
        found = {param.codec for params in blocks for param in params} - set(UNQUANTIZED)
        if found and found <= {weight_format, FORMATS[weight_format].name}:
            return None
        if found:
            raise InvalidRequest(
                "{where} is quantized already ({found}); converted to {weight_format}, it would have the errors of "
                "both.\n\nWhat to do: choose weight_format auto, or a bf16, fp16 or fp32 file.",
                code="weight_cache.quantized_already",
                where=where,
                found=sorted(found),
                weight_format=weight_format,
            )
        matrices = tuple(
            tuple(quantized_matrix(f"{prefix}{i}.", param, weight_format) for param in sorted(params, key=_place))
            for i, params in enumerate(blocks)
        )
        return cls(source, weight_format, cache_path(source, weight_format, folder), matrices)

    @property
    def nbytes(self) -> int:
        """Of the file's tensors."""
        return sum(matrix.nbytes for matrix in self._matrices())

    @property
    def working_bytes(self) -> int:
        """The most that `make` holds: a matrix as it is read and as it is stored, and scratch memory."""
        return _SCRATCH_BYTES + max(matrix.source.nbytes + matrix.nbytes for matrix in self._matrices())

    def is_there(self) -> bool:
        """Whether the file is, by its header."""
        try:
            return self.path.is_file() and self._is_ours(open_checkpoint(self.path))
        except CheckpointError:
            return False

    def in_folder(self, folder: Path) -> "RequantizedWeights":
        """The same in another folder."""
        return replace(self, path=folder / self.path.name)

    def check_room(self) -> None:
        """Raise CacheError where the file has to be made and the disk lacks room. Reads headers only."""
        if not self.is_there():
            require_place(self.path)
            self._require_room()

    def _require_room(self) -> None:
        folder = next(folder for folder in self.path.parents if folder.exists())
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise CacheError(
                "{folder} cannot be used ({error}). Check that your user account may write there.",
                code="weight_cache.folder_unusable",
                folder=folder,
                error=error,
            ) from error
        needed = self.nbytes + _FREE_BYTES
        if free < needed:
            raise CacheError(
                "Quantizing {file} to {weight_format} writes {writes_gb:.1f} GB to {folder}; that disk needs "
                "{needed_gb:.1f} GB of free space and has {free_gb:.1f} GB.\n\nWhat to do: free {lacking_gb:.1f} GB "
                "there (quantized weights that are no longer used can be cleared), or choose weight_format auto.",
                code="weight_cache.disk_full",
                file=self.source.path.name,
                weight_format=self.weight_format,
                writes_gb=self.nbytes / 1e9,
                folder=self.path.parent,
                needed_gb=needed / 1e9,
                free_gb=free / 1e9,
                lacking_gb=(needed - free) / 1e9,
            )

    def open(self) -> Checkpoint | None:
        """The source with its blocks' matrices from the file; None where it has to be made (again)."""
        if not self.path.is_file():
            return None
        try:
            file = open_checkpoint(self.path)
        except MissingFile:
            return None
        except CheckpointError:
            self._disbelieve("it is damaged or cut off")
            return None
        if not self._is_ours(file):
            self._disbelieve("it was made from another file, or by another version")
            return None
        stamp = _stamp_of_whole(file)
        if stamp is None:
            self._disbelieve("its data is not what was written")
            return None
        logger.info("%s in %s from %s", printable(self.source.path.name), self.weight_format, _shown(self.path))
        first = min(file.tensors.values(), key=lambda entry: entry.offset)
        return self.checkpoint(first.offset, stamp)

    def make(self, device: torch.device, on_block: OnBlock | None = None) -> Checkpoint:
        """Quantize on `device`, write the file, and open it.

        `on_block` is called with the blocks done and their number; it may raise to end the work, which leaves nothing.
        Raises CacheError where the disk lacks room or cannot be written to, MissingFile or DamagedFile where the
        source cannot be read.
        """
        remove_dead(self.path.parent)
        self._require_room()
        start = time.perf_counter()
        try:
            self._write(device, on_block)
        except CacheError:
            made = self.open()  # by another process meanwhile
            if made is None:
                raise
            return made
        seconds = time.perf_counter() - start
        names = _shown(self.source.path), seconds, _shown(self.path)
        logger.info("Quantized %s in %.0f s: %s, %.1f GB", *names, self.nbytes / 1e9)
        opened = self.open()
        if opened is None:
            raise CacheError(
                "{file} is gone or changed right after it was written. Queue the prompt again.",
                code="weight_cache.gone_at_once",
                file=self.path,
            )
        return opened

    def checkpoint(self, data_start: int, stamp: Stamp | None = None) -> Checkpoint:
        """The source with its blocks' matrices in the file, whose tensors begin at byte `data_start`."""
        tensors = dict(self.source.tensors)
        offset = data_start
        for part in self._parts():
            if part.known is None:
                dtype, shape = part.held or (part.dtype, part.shape)
                tensors[part.name] = TensorEntry(self.path, offset, part.nbytes, dtype, shape, stamp=stamp)
            offset += part.nbytes
        identity = f"{self.source.identity}-{self.weight_format}-{VERSION}"
        return replace(self.source, tensors=tensors, identity=identity)

    def _matrices(self) -> Iterator[Matrix]:
        return (matrix for block in self.blocks for matrix in block)

    def _parts(self) -> Iterator[Part]:
        return (part for matrix in self._matrices() for part in matrix.parts)

    def _metadata(self) -> dict[str, str]:
        return {
            "format": "pt",
            "quantized_by": MAKER,
            "version": VERSION,
            "weight_format": self.weight_format,
            "source_identity": self.source.identity,
        }

    def _header(self, made: int, crc: int) -> bytes:
        """The file up to its data; as long for every `made` (seconds since 1970) and `crc` (of the data)."""
        tensors: dict[str, Any] = {}
        end = 0
        for part in self._parts():
            begin, end = end, end + part.nbytes
            tensors[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [begin, end]}
        written = {"source": str(self.source.path), "made": f"{made:012d}", "crc32": f"{crc:08x}"}
        raw = json.dumps({"__metadata__": self._metadata() | written, **tensors}).encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw

    def _write(self, device: torch.device, on_block: OnBlock | None) -> None:
        made = int(time.time()) // 2 * 2  # a time that every file system keeps as it is
        before = self._source_stats()
        reader = TensorReader()
        crc = 0
        try:
            with whole_file(self.path, mtime_s=made) as stream:
                stream.write(self._header(made, crc))
                for done, block in enumerate(self.blocks):
                    if on_block is not None:
                        on_block(done, len(self.blocks))
                    for matrix in block:
                        for data in self._stored(matrix, reader, device):
                            stream.write(data)
                            crc = zlib.crc32(data, crc)
                    stream.flush()
                    os.fsync(stream.fileno())  # block by block: what waits for the disk takes memory too
                if on_block is not None:
                    on_block(len(self.blocks), len(self.blocks))
                if self._source_stats() != before:
                    raise MissingFile(
                        "{file} was changed while it was being quantized. Queue the prompt again.",
                        code="weight_cache.source_changed",
                        file=self.source.path,
                    )
                if self.open() is not None:  # and read by that process's model, under whose reads it must not change
                    raise CacheError(
                        "{file} was made by another process in the meantime.",
                        code="weight_cache.made_by_another",
                        file=self.path,
                    )
                stream.seek(0)
                stream.write(self._header(made, crc))
        finally:
            reader.close()

    @torch.no_grad()
    def _stored(self, matrix: Matrix, reader: TensorReader, device: torch.device) -> list[memoryview]:
        """The bytes of a matrix's parts."""
        raw = torch.empty(matrix.source.nbytes, dtype=torch.uint8)
        reader.read_into(matrix.source, memoryview(raw.numpy()))
        weight = raw.view(TORCH_DTYPES[matrix.source.dtype]).view(matrix.source.shape).to(device)
        del raw
        encoded = iter(FORMATS[self.weight_format].encode(weight))
        return [memoryview(part.known) if part.known is not None else _bytes(next(encoded)) for part in matrix.parts]

    def _source_stats(self) -> list[tuple[int, int]]:
        entries = [matrix.source for matrix in self._matrices()]
        files = sorted({piece.file for entry in entries for piece in (entry, *entry.parts)})
        try:
            stats = [file.stat() for file in files]
        except OSError as error:
            raise MissingFile(
                "{file} can no longer be read ({error}).", code="file.gone", file=self.source.path, error=error
            ) from error
        return [(stat.st_size, stat.st_mtime_ns) for stat in stats]

    def _is_ours(self, file: Checkpoint) -> bool:
        """Whether the file's header is that of this source, format and version, tensor by tensor."""
        if not self._metadata().items() <= file.metadata.items():
            return False
        expected, offset = {}, 0
        for part in self._parts():
            expected[part.name] = (offset, part.nbytes, part.dtype, part.shape)
            offset += part.nbytes
        start = min((entry.offset for entry in file.tensors.values()), default=0)
        return expected == {
            name: (entry.offset - start, entry.nbytes, entry.dtype, entry.shape) for name, entry in file.tensors.items()
        }

    def _disbelieve(self, why: str) -> None:
        logger.warning("%s is not used and will be made again: %s", _shown(self.path), why)


def _shown(path: Path) -> str:
    return printable(str(path))


def _place(param: StoredParam) -> tuple[str, int]:
    return str(param.parts[0].file), param.parts[0].offset


def _bytes(part: Tensor) -> memoryview:
    return memoryview(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _stamp_of_whole(file: Checkpoint) -> Stamp | None:
    """The file's stamp where nobody has changed it since it was made, or what it holds is the same all the same; None
    where it is not."""
    made, crc = file.metadata.get("made", ""), file.metadata.get("crc32", "")
    if not (re.fullmatch(r"\d{12}", made) and re.fullmatch(r"[0-9a-f]{8}", crc)):
        return None
    opened = file.stamps[file.path]
    as_made = (opened[0], int(made) * 10**9)
    if opened == as_made:
        return opened
    try:
        if _data_crc(file) != int(crc, 16):
            return None
    except (DamagedFile, OSError) as error:
        logger.warning("%s cannot be read (%s)", _shown(file.path), error)
        return None
    try:  # it was copied: the next time its data need not be read, if the file is this user's
        os.utime(file.path, (int(made), int(made)))
    except OSError:
        return opened
    return as_made


def _data_crc(file: Checkpoint) -> int:
    start = min(entry.offset for entry in file.tensors.values())
    crc, left = 0, file.nbytes
    with open_regular(file.path) as stream:
        stream.seek(start)
        while left and (data := stream.read(min(left, _READ_BYTES))):
            crc, left = zlib.crc32(data, crc), left - len(data)
        require_unchanged(stream, file.path, file.stamps[file.path])
    return crc
