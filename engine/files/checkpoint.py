"""Index every tensor of a model file or folder from headers alone. Never loads a tensor."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DamagedFile, MissingFile
from .gguf_header import read_gguf_header
from .header import Header, HeaderCache
from .json_texts import parse_json, read_text, unreadable
from .model_files import GGUF_SUFFIX, is_gguf, model_files
from .part_files import stem_of
from .regular_file import Stamp, require_all_unchanged
from .safetensors_header import read_safetensors_header

__all__ = ["GGUF_SUFFIX", "Checkpoint", "TensorEntry", "open_checkpoint"]

# GGUF's settings of a part: which (from 0), of how many, and how many tensors all of them hold
_SPLIT_NUMBER, _SPLIT_COUNT, _SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"

_HEADERS = HeaderCache()  # of the process: validation, a change's check and loading open the same files


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor's bytes lie: `nbytes` bytes at `offset` of `file`.

    dtype: safetensors' name, or ggml's in a GGUF file (where F32, F16 and BF16 are the same). shape: rows first.
    data: the bytes themselves, where the file states them as text, or where they are in memory.
    stamp: of the file when its header was read; None for what is in memory, or not on disk yet.
    parts: a tensor that its file holds in pieces of one dtype; its bytes are `run_bytes` of each in turn, again and
    again, and file and offset are the first one's.
    """

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview | None = None
    parts: tuple["TensorEntry", ...] = ()
    run_bytes: int = 0
    stamp: Stamp | None = None


@dataclass(frozen=True)
class Checkpoint:
    """One model (transformer, text encoder or VAE) as it lies on disk.

    `identity` changes whenever a header, a size, a modification time or the configuration does; it keys every cache
    made from the weights. `config` is the folder's config.json, or the JSON under the metadata key "config" of a
    single file. `stamps`: of every file that was read, the configuration's and the index's too.
    """

    path: Path
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    config: Mapping[str, Any] | None = field(repr=False)
    identity: str
    stamps: Mapping[Path, Stamp] = field(repr=False, default_factory=dict)

    def require_unchanged(self) -> None:
        """Raise DamagedFile where a file is another than the one that was read, MissingFile where it is gone. Opens
        none."""
        require_all_unchanged(self.stamps)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def largest_file(self) -> Path:
        """Where the largest tensor lies: one of the files that blocks are read from."""
        return max(self.tensors.values(), key=lambda entry: entry.nbytes).file

    @property
    def full_precision(self) -> bool:
        """Whether all matrices are stored in 32-bit floating point."""
        return {entry.dtype for entry in self.tensors.values() if len(entry.shape) > 1} == {"F32"}


def open_checkpoint(path: Path) -> Checkpoint:
    """Index a .safetensors or .gguf file, or a folder (one .safetensors file, or shards).

    A file that is one of several parts stands for all of them; `path` is then the first one's. Headers of files that
    stay as they are are read once. Raises MissingFile where there is nothing to read, a part is missing, or no
    permission; DamagedFile where a header is not one or promises more bytes than the file has, where tensors overlap or
    leave gaps, or an index names what is not there. A GGUF file's settings are its metadata, numbers and short lists as
    JSON.
    """
    files = model_files(path)
    if not path.is_dir():
        path = files.weights[0]
    digest = hashlib.sha256()
    config, stamps = None, dict(files.stamps)
    if files.config is not None:
        raw, stamps[files.config] = read_text(files.config)
        digest.update(raw)
        config = parse_json(raw, str(files.config))
    headers = {file: _header(file, digest) for file in files.weights}
    stamps |= {file: header.stamp for file, header in headers.items()}
    tensors = _entries(headers)
    metadata = _settings(headers, len(tensors)) if is_gguf(path) else _metadata(headers)
    _require_indexed(path, files.weight_map, tensors)
    stated = metadata.get("config", "")
    if config is None and (stated.startswith("{") or (stated and is_gguf(path))):
        # trainers of LoRAs keep other texts there
        config = parse_json(stated, f"{path}: metadata key 'config'")
    return Checkpoint(path, tensors, metadata, config, digest.hexdigest()[:16], stamps)


def _header(file: Path, digest: "hashlib._Hash") -> Header:
    """The file's header, which is added to what an identity is made from."""
    try:
        header = _HEADERS.get(file, read_gguf_header if is_gguf(file) else read_safetensors_header)
    except OSError as error:
        raise unreadable(file, error) from error
    size, mtime_ns = header.stamp
    digest.update(header.mark + os.fsencode(file.name) + f" {size} {mtime_ns}".encode())
    return header


def _entries(headers: Mapping[Path, Header]) -> dict[str, TensorEntry]:
    found: dict[str, TensorEntry] = {}
    for file, header in headers.items():
        for name, tensor in header.tensors.items():
            if name in found:
                raise DamagedFile(
                    "{folder}: tensor {name!r} is in two files, {first} and {second}. Remove the one that does not "
                    "belong there, or use parts that were made together.",
                    code="file.tensor_in_two_files",
                    folder=file.parent,
                    name=name,
                    first=found[name].file.name,
                    second=file.name,
                )
            found[name] = TensorEntry(
                file, tensor.offset, tensor.nbytes, tensor.dtype, tensor.shape, stamp=header.stamp
            )
    return found


def _metadata(headers: Mapping[Path, Header]) -> dict[str, str]:
    return {key: value for header in headers.values() for key, value in header.metadata.items()}


def _settings(headers: Mapping[Path, Header], tensor_count: int) -> dict[str, str]:
    """Of all parts of a GGUF file; the first one's count most."""
    settings: dict[str, str] = {}
    for number, (file, header) in enumerate(headers.items()):
        _require_part(file, header.metadata, number, len(headers))
        settings = {**header.metadata, **settings}
    if settings.get(_SPLIT_TENSORS, str(tensor_count)) != str(tensor_count):
        raise DamagedFile(
            "{file}: its {parts} parts hold {tensor_count} tensors, but the first part's header says "
            "{stated_count:.20}. Use parts of one model that were made together.",
            code="file.parts_of_different_models",
            file=next(iter(headers)),
            parts=len(headers),
            tensor_count=tensor_count,
            stated_count=settings[_SPLIT_TENSORS],
        )
    return settings


def _require_part(file: Path, settings: Mapping[str, str], number: int, count: int) -> None:
    """Raise MissingFile or DamagedFile where a GGUF file's header says of parts what its name does not."""
    stated = settings.get(_SPLIT_COUNT, "1")
    if stated in ("0", "1"):
        return
    of = settings.get(_SPLIT_NUMBER, "?")
    which = f"part {int(of) + 1 if of.isdecimal() and len(of) < 9 else '?'} of {stated:.20} by its header"
    if count == 1:
        example = f"{stem_of(file)}-00001-of-{stated:0>5.20}.gguf"
        raise MissingFile(
            "{file} is {which}, but its name does not say so, and the other parts cannot be found. Put all parts into "
            "one folder under their original names, such as {example}.",
            code="file.part_without_name",
            file=file,
            which=which,
            example=example,
        )
    if (of, stated) != (str(number), str(count)):
        raise DamagedFile(
            "{file} is {which}. Give the parts their original names.",
            code="file.part_misnamed",
            file=file,
            which=which,
        )


def _require_indexed(path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    """Raise DamagedFile where a folder's index names tensors that are not in the files that it says."""
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise DamagedFile(
                "{folder}: its index says that {name!r:.199} is in {file}, but it is not. The files do not belong "
                "together: download them again.",
                code="file.index_names_another_file",
                folder=path,
                name=name,
                file=file,
            )
