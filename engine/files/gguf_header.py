"""Read the header of a GGUF file: its settings, and where its tensors lie. Reads no weight, and judges no model."""

import hashlib
import json
from collections.abc import Mapping
from enum import IntEnum
from math import prod
from pathlib import Path
from struct import Struct, calcsize, unpack_from
from typing import Any, BinaryIO

from ..errors import DamagedFile
from ..packages import ggml_types
from .header import Header, StoredTensor
from .regular_file import stamp_of

MAGIC = b"GGUF"
# vocabularies of 150,000 tokens and their merges take 6 MB
MAX_HEADER_BYTES = 32_000_000
MAX_ENTRIES = 50_000  # tensors, or settings; large models have 2,000
MAX_TEXTS = 1_500_000  # in lists; the largest vocabularies have 260,000 tokens and 520,000 merges
MAX_DIMENSIONS = 8
MAX_NAME = 256  # bytes of a tensor's or a setting's name
# longer lists (vocabularies) are skipped
_MAX_LIST = 64

_PIECE_BYTES = 64_000
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
_SIZES = {code: calcsize(code) for code in ("<I", "<Q", *_SCALARS.values())}
_LENGTH = Struct("<Q").unpack_from


def read_gguf_header(file: Path, stream: BinaryIO) -> Header:
    """Of an open file, from its beginning: settings as texts (numbers and short lists as JSON; longer lists are left
    out), and tensors by name.

    Raises DamagedFile where the header is none, or promises more bytes than there are; MissingPackage; OSError as read
    does.
    """
    stamp = stamp_of(stream)
    reader = _Reader(file, stream, stamp[0])
    _require_gguf(file, reader)
    tensor_count, setting_count = reader.number("<Q"), reader.number("<Q")
    if max(tensor_count, setting_count) > MAX_ENTRIES:
        raise DamagedFile(
            "{file} is damaged: its header claims {tensor_count} tensors and {setting_count} settings. Download it "
            "again.",
            code="gguf.too_many_entries",
            file=file,
            tensor_count=tensor_count,
            setting_count=setting_count,
        )
    settings = _settings(file, reader, setting_count)
    infos = [reader.tensor_info() for _ in range(tensor_count)]
    alignment = _alignment(file, settings)
    data_start = -(-reader.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, type_number, shape, offset in infos:
        if name in tensors:
            raise DamagedFile(
                "{file}: tensor {name!r} appears twice in its header. Download it again.",
                code="gguf.tensor_twice",
                file=file,
                name=name,
            )
        tensors[name] = _tensor(file, name, type_number, shape, data_start + offset, stamp[0])
    _require_apart(file, tensors)
    return Header(tensors, settings, reader.digest().encode(), stamp)


def _require_gguf(file: Path, reader: "_Reader") -> None:
    if (magic := reader.take(len(MAGIC))) != MAGIC:
        # a safetensors file begins with the length of a JSON object, in eight bytes
        if reader.peek(5)[4:] == b"{":
            raise DamagedFile(
                "{file} is not a GGUF file, but a safetensors file. Rename it so that it ends in .safetensors.",
                code="gguf.is_safetensors",
                file=file,
            )
        raise DamagedFile(
            "{file} is not a GGUF file: it begins with {begins_with!r}. Download it again.",
            code="gguf.not_gguf",
            file=file,
            begins_with=magic,
        )
    version = reader.number("<I")
    if version not in _VERSIONS:
        raise DamagedFile(
            "{file} is a GGUF file of version {version}; versions 2 and 3 are read. Convert it.",
            code="gguf.unknown_version",
            file=file,
            version=version,
        )


def _settings(file: Path, reader: "_Reader", count: int) -> dict[str, str]:
    settings: dict[str, str] = {}
    names: set[str] = set()
    for _ in range(count):
        key = reader.name()
        if key in names:
            raise DamagedFile(
                "{file}: setting {key!r:.199} appears twice in its header. Download it again.",
                code="gguf.setting_twice",
                file=file,
                key=key,
            )
        names.add(key)
        value = reader.value(reader.number("<I"))
        if value is not None:
            settings[key] = value
    return settings


class _Reader:
    """Takes values from the front of a file, never more than the file has or a header may have. Reads it in growing
    pieces, into one buffer."""

    def __init__(self, file: Path, stream: BinaryIO, size: int) -> None:
        self._file, self._stream = file, stream
        self._end = min(size, MAX_HEADER_BYTES)
        self._buffer = bytearray()
        self._texts = 0  # in lists, so far
        self.position = 0

    def take(self, count: int) -> bytes:
        start = self._advance(count)
        return bytes(self._buffer[start : self.position])

    def peek(self, count: int) -> bytes:
        """Fewer where the file ends."""
        self._fill(min(self.position + count, self._end))
        return bytes(self._buffer[self.position : self.position + count])

    def number(self, code: str) -> Any:
        start = self._advance(_SIZES[code])
        return unpack_from(code, self._buffer, start)[0]

    def name(self) -> str:
        """A text of a name's length."""
        length = self.number("<Q")
        if length > MAX_NAME:
            raise DamagedFile(
                "{file} is damaged: a name in its header has {length} bytes. Download it again.",
                code="gguf.name_too_long",
                file=self._file,
                length=length,
            )
        return self._text(length)

    def text(self) -> str:
        return self._text(self.number("<Q"))

    def _text(self, length: int) -> str:
        raw = self.take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedFile(
                "{file}: a name in its header is not text. Download it again.",
                code="gguf.name_no_text",
                file=self._file,
            ) from error

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
            self._skip_texts(count)
            return None
        if item not in _SCALARS:
            raise self._strange(item)
        code = _SCALARS[GGUFValueType(item)]
        start = self._advance(count * _SIZES[code])
        return None if count > _MAX_LIST else json.dumps(unpack_from(f"<{count}{code[1]}", self._buffer, start))

    def tensor_info(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self.name(), self.number("<I")
        if dimensions > MAX_DIMENSIONS:
            raise DamagedFile(
                "{file}: {name!r:.99} has {dimensions} dimensions, which is too many. Download it again.",
                code="gguf.too_many_dimensions",
                file=self._file,
                name=name,
                dimensions=dimensions,
            )
        shape = [self.number("<Q") for _ in range(dimensions)]
        # the fastest dimension stands first in the file
        return name, self.number("<I"), tuple(reversed(shape)), self.number("<Q")

    def digest(self) -> str:
        """Of everything taken so far."""
        return hashlib.sha256(memoryview(self._buffer)[: self.position]).hexdigest()

    def _skip_texts(self, count: int) -> None:
        self._texts += count
        if self._texts > MAX_TEXTS:
            raise DamagedFile(
                "{file} is damaged: lists in its header claim {texts} strings. Download it again.",
                code="gguf.too_many_texts",
                file=self._file,
                texts=self._texts,
            )
        buffer, position = self._buffer, self.position
        for _ in range(count):
            start, position = position, position + 8
            if position > len(buffer):
                self._fill(position)
            position += _LENGTH(buffer, start)[0]
        self._fill(position)
        self.position = position

    def _advance(self, count: int) -> int:
        """Where the next `count` bytes begin in the buffer, which are there."""
        start, self.position = self.position, self.position + count
        if self.position > len(self._buffer):
            self._fill(self.position)
        return start

    def _fill(self, end: int) -> None:
        """Read on until byte `end` is in the buffer. Raises DamagedFile where it cannot be."""
        if end > self._end:
            raise self._cut_off(end)
        while len(self._buffer) < end:
            wanted = max(_PIECE_BYTES, len(self._buffer), end - len(self._buffer))
            more = self._stream.read(min(wanted, self._end - len(self._buffer)))
            if not more:
                raise self._cut_off(end)
            self._buffer += more

    def _cut_off(self, end: int) -> DamagedFile:
        return DamagedFile(
            "{file} is cut off, or is not a GGUF file: its header extends to byte {header_end}, but only "
            "{readable_end} can be read. Download it again.",
            code="gguf.cut_off",
            file=self._file,
            header_end=end,
            readable_end=self._end,
        )

    def _strange(self, kind: int) -> DamagedFile:
        return DamagedFile(
            "{file}: its header has a value of unknown type {kind}. Download it again.",
            code="gguf.unknown_value_type",
            file=self._file,
            kind=kind,
        )


def _require_apart(file: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise DamagedFile where two tensors share bytes."""
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.nbytes and tensor.offset < end:
            raise DamagedFile(
                "{file} is damaged: {name!r} overlaps {before!r}. Download it again.",
                code="gguf.tensors_overlap",
                file=file,
                name=name,
                before=before,
            )
        if tensor.nbytes:
            end, before = tensor.offset + tensor.nbytes, name


def _alignment(file: Path, settings: Mapping[str, str]) -> int:
    text = settings.get("general.alignment", str(_DEFAULT_ALIGNMENT))
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if value < 1 or value & (value - 1):
        raise DamagedFile(
            "{file}: its alignment is {alignment:.99}, which is not a power of two. Download it again.",
            code="gguf.wrong_alignment",
            file=file,
            alignment=text,
        )
    return value


def _tensor(
    file: Path, name: str, type_number: int, shape: tuple[int, ...], offset: int, file_size: int
) -> StoredTensor:
    types = ggml_types()
    try:
        kind = types.GGMLQuantizationType(type_number)
    except ValueError as error:
        raise DamagedFile(
            "{file}: {name!r} has the unknown ggml type {type_number}. Update the gguf package, or use another file.",
            code="gguf.unknown_tensor_type",
            file=file,
            name=name,
            type_number=type_number,
        ) from error
    block, block_bytes = types.GGML_QUANT_SIZES[kind]
    row = shape[-1] if shape else 1
    nbytes = prod(shape) // block * block_bytes
    if row % block or offset + nbytes > file_size:
        raise DamagedFile(
            "{file} is cut off or damaged: {name!r} {kind}{shape} of {nbytes} bytes at {offset} is not within its "
            "{file_size} bytes. Download it again.",
            code="gguf.tensor_beyond_end",
            file=file,
            name=name,
            kind=kind.name,
            shape=list(shape),
            nbytes=nbytes,
            offset=offset,
            file_size=file_size,
        )
    return StoredTensor(kind.name, shape, offset, nbytes)
