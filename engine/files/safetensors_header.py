"""Read the header of a safetensors file: where its tensors lie. Reads no weight, and judges no model."""

from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DamagedFile
from .header import Header, StoredTensor
from .json_texts import MAX_JSON_BYTES, parse_json
from .regular_file import stamp_of

MAX_TENSORS = 50_000  # large models have 2,000, quantized ones 10,000
MAX_DIMENSIONS = 8
MAX_NAME = 256  # characters of a tensor's name

BITS_PER_ELEMENT = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip

# what else people have under a model's name, by its first bytes, and what to do about it
_OTHER_FILES = (
    (b"GGUF", "a GGUF file. Rename it so that it ends in .gguf"),
    (b"PK\x03\x04", "a zip archive, like PyTorch's .pt files. Use the model's .safetensors file"),
    (b"\x80\x02", "a pickle file. Use the model's .safetensors file"),
    (b"version ", "only a git-lfs pointer. Download the file itself"),
    (b"<", "a web page. Download the file itself, not the page that shows it"),
)


def read_safetensors_header(file: Path, stream: BinaryIO) -> Header:
    """Of an open file, from its beginning. Raises DamagedFile where the header is none, or its tensors are not exactly
    the bytes behind it, as safetensors' own reader does; OSError as read does."""
    stamp = stamp_of(stream)
    raw = _raw(file, stream, stamp[0])
    stated = parse_json(raw, f"{file}: its header")
    metadata = stated.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedFile(
            "{file}: '__metadata__' in its header is not a table of strings. Download it again.",
            code="safetensors.metadata_no_texts",
            file=file,
        )
    if len(stated) > MAX_TENSORS:
        raise DamagedFile(
            "{file} announces {count} tensors; no model has more than {most}. Download it again.",
            code="safetensors.too_many_tensors",
            file=file,
            count=len(stated),
            most=MAX_TENSORS,
        )
    data_start = 8 + len(raw)
    tensors = {name: _tensor(file, name, info, data_start, stamp[0]) for name, info in stated.items()}
    _require_whole_spans(file, list(tensors.values()), data_start, stamp[0])
    return Header(tensors, metadata, raw, stamp)


def _raw(file: Path, stream: BinaryIO, size: int) -> bytes:
    prefix = stream.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(MAX_JSON_BYTES, size - 8):
        other = next((words for magic, words in _OTHER_FILES if prefix.startswith(magic)), None)
        if other is not None:
            raise DamagedFile(
                "{file} is not a safetensors file, but {other}.", code="safetensors.other_file", file=file, other=other
            )
        raise DamagedFile(
            "{file} is not a safetensors file, or is cut off: it has {size} bytes, and its first 8 announce a header "
            "of {length}. Download it again.",
            code="safetensors.not_safetensors",
            file=file,
            size=size,
            length=length,
        )
    return stream.read(length)


def _tensor(file: Path, name: str, info: Any, data_start: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        if not (isinstance(dtype, str) and dtype.isascii() and dtype.isidentifier() and len(dtype) < MAX_NAME):
            raise ValueError(f"dtype {dtype!r:.99}")
        if len(name) > MAX_NAME or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{len(name)} characters, {len(shape)} dimensions")
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)) or begin > end:
            raise ValueError(f"shape {info['shape']!s:.99}, bytes {info['data_offsets']!s:.99}")
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(
            "{file}: the header entry of {name!r:.99} is damaged ({error}). Download it again.",
            code="safetensors.damaged_entry",
            file=file,
            name=name,
            error=error,
        ) from error
    if data_start + end > size:
        raise DamagedFile(
            "{file} is cut off: {name!r} ends at byte {tensor_end}, but the file has {size}. Download it again.",
            code="safetensors.cut_off",
            file=file,
            name=name,
            tensor_end=data_start + end,
            size=size,
        )
    bits = BITS_PER_ELEMENT.get(dtype)
    if bits is not None and prod(shape) * bits != (end - begin) * 8:
        raise DamagedFile(
            "{file}: {name!r} {dtype}{shape} cannot have {nbytes} bytes. Download it again.",
            code="safetensors.wrong_tensor_size",
            file=file,
            name=name,
            dtype=dtype,
            shape=list(shape),
            nbytes=end - begin,
        )
    return StoredTensor(dtype, shape, data_start + begin, end - begin)


def _require_whole_spans(file: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """Raise DamagedFile where tensors share bytes, or bytes belong to none."""
    end, before = data_start, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            how = "overlaps" if tensor.offset < end else "leaves a gap after"
            raise DamagedFile(
                "{file} is damaged: a tensor at byte {offset} {how} {before}, which ends at {end}. Download it again.",
                code="safetensors.gap_or_overlap",
                file=file,
                offset=tensor.offset,
                how=how,
                before=before,
                end=end,
            )
        end, before = tensor.offset + tensor.nbytes, "the tensor before it"
    if end != size:
        raise DamagedFile(
            "{file} is damaged: {nbytes} bytes after its last tensor, which ends at {end}, belong to no tensor. "
            "Download it again.",
            code="safetensors.bytes_left_over",
            file=file,
            nbytes=size - end,
            end=end,
        )
