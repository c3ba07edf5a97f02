"""Read the header of a GGUF file: its settings, and where its tensors lie. Reads no weight, and judges no model."""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DamagedFile
from ..packages import ggml_types
from .regular_file import open_regular

MAGIC = b"GGUF"
# vocabularies of 150,000 tokens and their merges take 6 MB
MAX_HEADER_BYTES = 32_000_000
MAX_ENTRIES = 50_000  # tensors, or settings; large models have 2,000
MAX_DIMENSIONS = 8
MAX_NAME = 256  # bytes of a tensor's or a setting's name
# longer lists (vocabularies) are skipped
_MAX_LIST = 64

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32


class GGUFValueType(IntEnum):
    """Of a setting (https://github.com/ggml-org/ggml, docs/gguf.md)."""

    UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)


_SCALARS = {
    GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.UINT16: "<H", GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i", GGUFValueType.UINT64: "<Q", GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f", GGUFValueType.FLOAT64: "<d", GGUFValueType.BOOL: "<?",
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """`nbytes` bytes at `offset` of the file, of a ggml type's name; `shape` has the rows first, as torch has it."""

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Settings as texts (numbers and short lists as JSON), tensors by name, and a digest of the header's bytes."""

    settings: Mapping[str, str]
    tensors: Mapping[str, GgufTensor]
    digest: str
    size: int
    mtime_ns: int


def read_gguf_header(file: Path) -> GgufHeader:
    """Raises DamagedFile where the header is none, or promises more bytes than there are; MissingPackage; OSError as
    open does."""
    with open_regular(file) as stream:
        stat = os.fstat(stream.fileno())
        reader = _Reader(file, stream, stat.st_size)
        if (magic := reader.take(len(MAGIC))) != MAGIC:
            # a safetensors file begins with the length of a JSON object, in eight bytes
            if (magic + stream.read(5))[8:] == b"{":
                raise DamagedFile(f"{file} is no GGUF file, but a safetensors file. Give it the ending .safetensors.")
            raise DamagedFile(f"{file} is no GGUF file: it begins with {magic!r}. Download it again.")
        version = reader.number("<I")
        if version not in _VERSIONS:
            raise DamagedFile(f"{file} is a GGUF file of version {version}; versions 2 and 3 are read. Convert it.")
        tensor_count, setting_count = reader.number("<Q"), reader.number("<Q")
        if max(tensor_count, setting_count) > MAX_ENTRIES:
            raise DamagedFile(
                f"{file} is damaged: it announces {tensor_count} tensors and {setting_count} settings. "
                "Download it again."
            )
        settings: dict[str, str] = {}
        for _ in range(setting_count):
            key = reader.name()
            value = reader.value(reader.number("<I"))
            if value is not None:
                settings[key] = value
        infos = [reader.tensor_info() for _ in range(tensor_count)]
        alignment = _alignment(file, settings)
        data_start = -(-reader.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, type_number, shape, offset in infos:
            if name in tensors:
                raise DamagedFile(f"{file}: tensor {name!r} stands twice in its header. Download it again.")
            tensors[name] = _tensor(file, name, type_number, shape, data_start + offset, stat.st_size)
        _require_apart(file, tensors)
        return GgufHeader(settings, tensors, reader.digest(), stat.st_size, stat.st_mtime_ns)


class _Reader:
    """Takes values from the front of a file, never more than the file has or a header may have."""

    def __init__(self, file: Path, stream: BinaryIO, size: int) -> None:
        self._file, self._stream = file, stream
        self._end = min(size, MAX_HEADER_BYTES)
        self.position = 0

    def take(self, count: int) -> bytes:
        self._advance(count)
        return self._stream.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def name(self) -> str:
        """A text of a name's length."""
        length = self.number("<Q")
        if length > MAX_NAME:
            raise DamagedFile(f"{self._file} is damaged: a name in its header has {length} bytes. Download it again.")
        return self._text(length)

    def text(self) -> str:
        return self._text(self.number("<Q"))

    def _text(self, length: int) -> str:
        raw = self.take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedFile(f"{self._file}: a name in its header is no text. Download it again.") from error

    def value(self, kind: int) -> str | None:
        """A setting's value as text; None for a long list, which is skipped."""
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind in _SCALARS:
            return json.dumps(self.number(_SCALARS[GGUFValueType(kind)]))
        if kind != GGUFValueType.ARRAY:
            raise self._strange(kind)
        item, count = self.number("<I"), self.number("<Q")
        if item == GGUFValueType.STRING:
            for _ in range(count):
                self._skip(self.number("<Q"))
            return None
        if item not in _SCALARS:
            raise self._strange(item)
        code = _SCALARS[GGUFValueType(item)]
        if count > _MAX_LIST:
            self._skip(count * struct.calcsize(code))
            return None
        return json.dumps([self.number(code) for _ in range(count)])

    def tensor_info(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self.name(), self.number("<I")
        if dimensions > MAX_DIMENSIONS:
            raise DamagedFile(f"{self._file}: {name!r:.99} has {dimensions} dimensions. Download it again.")
        shape = [self.number("<Q") for _ in range(dimensions)]
        # the fastest dimension stands first in the file
        return name, self.number("<I"), tuple(reversed(shape)), self.number("<Q")

    def digest(self) -> str:
        """Of everything taken so far."""
        self._stream.seek(0)
        return hashlib.sha256(self._stream.read(self.position)).hexdigest()

    def _skip(self, count: int) -> None:
        self._advance(count)
        self._stream.seek(count, os.SEEK_CUR)

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position > self._end:
            raise DamagedFile(
                f"{self._file} is cut off, or is no GGUF file: its header goes on to byte {self.position}, "
                f"{self._end} can be read. Download it again."
            )

    def _strange(self, kind: int) -> DamagedFile:
        return DamagedFile(f"{self._file}: its header has a value of unknown type {kind}. Download it again.")


def _require_apart(file: Path, tensors: Mapping[str, GgufTensor]) -> None:
    """Raise DamagedFile where two tensors share bytes."""
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.nbytes and tensor.offset < end:
            raise DamagedFile(f"{file} is damaged: {name!r} overlaps {before!r}. Download it again.")
        if tensor.nbytes:
            end, before = tensor.offset + tensor.nbytes, name


def _alignment(file: Path, settings: Mapping[str, str]) -> int:
    text = settings.get("general.alignment", str(_DEFAULT_ALIGNMENT))
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if value < 1 or value & (value - 1):
        raise DamagedFile(f"{file}: its alignment is {text:.99}, no power of two. Download it again.")
    return value


def _tensor(file: Path, name: str, type_number: int, shape: tuple[int, ...], offset: int, file_size: int) -> GgufTensor:
    types = ggml_types()
    try:
        kind = types.GGMLQuantizationType(type_number)
    except ValueError as error:
        raise DamagedFile(
            f"{file}: {name!r} has the unknown ggml type {type_number}. Update the gguf package, or use another."
        ) from error
    block, block_bytes = types.GGML_QUANT_SIZES[kind]
    row = shape[-1] if shape else 1
    nbytes = prod(shape) // block * block_bytes
    if row % block or offset + nbytes > file_size:
        raise DamagedFile(
            f"{file} is cut off or damaged: {name!r} {kind.name}{list(shape)} of {nbytes} bytes at {offset} is not in "
            f"its {file_size} bytes. Download it again."
        )
    return GgufTensor(kind.name, shape, offset, nbytes)
