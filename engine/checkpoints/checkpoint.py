"""Index every tensor of a model file or folder from headers alone. Never loads a tensor."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Any

from ..errors import CheckpointError, DamagedFile, MissingFile
from .gguf_header import read_gguf_header
from .parts import Part, parts_of, stem_of
from .regular_file import Stamp, open_regular, require_regular

logger = logging.getLogger(__name__)

# of a header or a configuration: Qwen-Image's takes 0.3 MB, 2 MB from bitsandbytes. As JSON it grows 25 times at most
MAX_JSON_BYTES = 16_000_000
MAX_JSON_DEPTH = 16
MAX_DIMENSIONS = 8
MAX_NAME = 256  # characters of a tensor's name
GGUF_SUFFIX = ".gguf"
# GGUF's settings of a part: which (from 0), of how many, and how many tensors all of them hold
_SPLIT_NUMBER, _SPLIT_COUNT, _SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"

BITS_PER_ELEMENT = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip

# what else people have under a model's name, by its first bytes, and what to do about it
_OTHER_FILES = (
    (b"GGUF", "a GGUF file. Give it the ending .gguf"),
    (b"PK\x03\x04", "a zip archive, as PyTorch's .pt files are. Use the model's .safetensors file"),
    (b"\x80\x02", "a pickle file. Use the model's .safetensors file"),
    (b"version ", "a pointer to a file of git-lfs. Download the file itself"),
    (b"<", "a web page. Download the file itself, not the page that shows it"),
)


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
    single file.
    """

    path: Path
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    config: Mapping[str, Any] | None = field(repr=False)
    identity: str

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

    A file that is one of several parts stands for all of them; `path` is then the first one's. Raises MissingFile where
    there is nothing to read, a part is missing, or no permission; DamagedFile where a header is not one or promises
    more bytes than the file has, where tensors overlap or leave gaps, or an index names what is not there. A GGUF
    file's settings are its metadata, numbers and short lists as JSON.
    """
    files, config_file, weight_map = _files_of(path)
    path = path if path.is_dir() else files[0]
    if path.suffix.lower() == GGUF_SUFFIX and not path.is_dir():
        return _open_gguf(files)
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    digest = hashlib.sha256()
    config = None
    if config_file is not None:
        raw = _read_text(config_file)
        digest.update(raw)
        config = parse_json(raw, str(config_file))
    for file in files:
        raw, data_start, size, mtime_ns = _read_header(file)
        digest.update(raw)
        digest.update(_stamp(file, size, mtime_ns))
        header = parse_json(raw, f"{file}: its header")
        metadata.update(_metadata(file, header.pop("__metadata__", None) or {}))
        for name, info in header.items():
            if name in tensors:
                raise DamagedFile(
                    f"{path}: tensor {name!r} stands in two files, {tensors[name].file.name} and {file.name}. "
                    "Remove the file that does not belong to the folder."
                )
            tensors[name] = _entry(file, name, info, data_start, (size, mtime_ns))
        _require_whole_spans(file, [tensors[name] for name in header], data_start)
    _require_indexed(path, weight_map, tensors)
    if config is None and metadata.get("config", "").startswith("{"):  # trainers of LoRAs keep other texts there
        config = parse_json(metadata["config"], f"{path}: metadata key 'config'")
    return Checkpoint(path, tensors, metadata, config, digest.hexdigest()[:16])


def _open_gguf(files: list[Path]) -> Checkpoint:
    """All parts of a GGUF file; the first one's settings count most."""
    tensors: dict[str, TensorEntry] = {}
    settings: dict[str, str] = {}
    digest = hashlib.sha256()
    for number, file in enumerate(files):
        try:
            header = read_gguf_header(file)
        except OSError as error:
            raise _unreadable(file, error) from error
        _require_part(file, header.settings, number, len(files))
        digest.update(header.digest.encode() + _stamp(file, header.size, header.mtime_ns))
        settings = {**header.settings, **settings}
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise DamagedFile(
                    f"{file}: {name!r} stands in {tensors[name].file.name} too. Use parts of one model, made together."
                )
            stamp = (header.size, header.mtime_ns)
            tensors[name] = TensorEntry(file, tensor.offset, tensor.nbytes, tensor.type, tensor.shape, stamp=stamp)
    if settings.get(_SPLIT_TENSORS, str(len(tensors))) != str(len(tensors)):
        raise DamagedFile(
            f"{files[0]}: its {len(files)} parts hold {len(tensors)} tensors, the first one's header says "
            f"{settings[_SPLIT_TENSORS]:.20}. Use parts of one model, made together."
        )
    config = parse_json(settings["config"], f"{files[0]}: its setting 'config'") if "config" in settings else None
    return Checkpoint(files[0], tensors, settings, config, digest.hexdigest()[:16])


def _require_part(file: Path, settings: Mapping[str, str], number: int, count: int) -> None:
    """Raise MissingFile or DamagedFile where a GGUF file's header says of parts what its name does not."""
    stated = settings.get(_SPLIT_COUNT, "1")
    if stated in ("0", "1"):
        return
    of = settings.get(_SPLIT_NUMBER, "?")
    which = f"part {int(of) + 1 if of.isdecimal() and len(of) < 9 else '?'} of {stated:.20} by its header"
    if count == 1:
        raise MissingFile(
            f"{file} is {which}, which its name does not say: the others cannot be found. Give all of them, in one "
            f"folder, the names that they were made with, such as {stem_of(file)}-00001-of-{stated:0>5.20}.gguf."
        )
    if (of, stated) != (str(number), str(count)):
        raise DamagedFile(f"{file} is {which}. Give the parts the names that they were made with.")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's object. Raises MissingFile or DamagedFile."""
    return parse_json(_read_text(file), str(file))


def parse_json(raw: str | bytes, what: str) -> dict[str, Any]:
    """The JSON object that a file states; `what` names the place. Raises DamagedFile, also for one that is too long
    to be held, or too deep to be printed."""
    if len(raw) > MAX_JSON_BYTES:
        raise DamagedFile(f"{what} has {len(raw)} bytes; no model's has more than {MAX_JSON_BYTES}. Download it again.")
    try:
        value = json.loads(raw, object_pairs_hook=_without_doubles)
    except _Double as error:
        raise DamagedFile(f"{what} names {error.args[0]!r:.199} twice. Download it again.") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{what} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise DamagedFile(f"{what} is a JSON {type(value).__name__}, not an object. Download it again.")
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for item in level if isinstance(item, dict | list) for child in _children(item)]
    if level:
        raise DamagedFile(f"{what} is JSON of more than {MAX_JSON_DEPTH} levels. Download it again.")
    return value


class _Double(ValueError):
    """A name that stands twice in a JSON object; the first reader would take one, the next the other."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _Double(name)
            seen.add(name)
    return found


def _children(item: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item


def _read_text(file: Path) -> bytes:
    """As much of it as a JSON file may have, and one byte more where there is more."""
    try:
        with open_regular(file) as stream:
            return stream.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise _unreadable(file, error) from error


def _stamp(file: Path, size: int, mtime_ns: int) -> bytes:
    return os.fsencode(file.name) + f" {size} {mtime_ns}".encode()


def _files_of(path: Path) -> tuple[list[Path], Path | None, Mapping[str, str]]:
    """The files with tensors, the configuration's, where there is one, and which tensors an index says are in which."""
    if not _exists(path):
        raise MissingFile(f"{path} does not exist. Check the name, or download the model again.")
    if not path.is_dir():
        files = parts_of(path)
        for file in files:
            require_regular(file)
        return files, *_beside_parts(files)
    config = path / "config.json" if _exists(path / "config.json") else None
    try:
        listed = sorted(path.iterdir())  # glob would take a folder without permission for an empty one
    except OSError as error:
        raise _unreadable(path, error) from error
    indexes = [file for file in listed if file.name.endswith(".safetensors.index.json")]
    singles = [file for file in listed if file.name.endswith(".safetensors")]
    if indexes:
        weight_map = _weight_map(indexes[0])
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not _exists(path / name)]
        if missing or not names:
            raise MissingFile(
                f"{path}: {indexes[0].name} names {len(names)} files, {len(missing)} of them are not there "
                f"({', '.join(missing[:3])!s:.200}). Put them there: the files are read together."
            )
        return [path / name for name in names], config, weight_map
    if len({stem_of(file) for file in singles}) == 1 and Part.of(singles[0]) is not None:
        return parts_of(singles[0]), config, {}
    if len(singles) != 1:
        raise MissingFile(
            f"{path} holds {len(singles)} .safetensors files and no index. A model folder has one file, or shards "
            "with a *.safetensors.index.json."
        )
    return singles, config, {}


def _beside_parts(files: list[Path]) -> tuple[Path | None, Mapping[str, str]]:
    """The configuration beside part files that have their folder to themselves, and what an index of theirs says."""
    folder = files[0].parent
    if len(files) == 1 or files[0].suffix.lower() == GGUF_SUFFIX:
        return None, {}
    index = folder / f"{stem_of(files[0])}.safetensors.index.json"
    weight_map = _weight_map(index) if _exists(index) else {}
    try:
        alone = {file.name for file in folder.iterdir() if file.suffix == files[0].suffix} == {f.name for f in files}
    except OSError as error:
        raise _unreadable(folder, error) from error
    return (folder / "config.json" if alone and _exists(folder / "config.json") else None), weight_map


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise DamagedFile(f"{index} has no 'weight_map' of tensors to file names. Download it again.")
    for name in sorted(set(weight_map.values())):
        # a path, in any system's way of writing one, would lead out of the folder
        if PureWindowsPath(name).name != name or not name.isprintable() or not name.endswith(".safetensors"):
            raise DamagedFile(
                f"{index} names {name!r:.99}, which is no .safetensors file of its own folder. Download it again."
            )
    return weight_map


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # a folder above it may not be entered; Path.exists() of Python 3.14 hides that
        raise _unreadable(path, error) from error
    return True


def _read_header(file: Path) -> tuple[bytes, int, int, int]:
    """The header's bytes, where the data begins, and the file's size and time."""
    try:
        with open_regular(file) as stream:
            stat = os.fstat(stream.fileno())
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(MAX_JSON_BYTES, stat.st_size - 8):
                other = next((words for magic, words in _OTHER_FILES if prefix.startswith(magic)), None)
                if other is not None:
                    raise DamagedFile(f"{file} is not a safetensors file, but {other}.")
                raise DamagedFile(
                    f"{file} is not a safetensors file, or is cut off: it has {stat.st_size} bytes, its first 8 "
                    f"announce a header of {length}. Download it again."
                )
            raw = stream.read(length)
    except OSError as error:
        raise _unreadable(file, error) from error
    return raw, 8 + length, stat.st_size, stat.st_mtime_ns


def _metadata(file: Path, given: Any) -> dict[str, str]:
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise DamagedFile(f"{file}: '__metadata__' in its header is no table of texts. Download it again.")
    return given


def _require_whole_spans(file: Path, entries: list[TensorEntry], data_start: int) -> None:
    """Raise DamagedFile where tensors share bytes, or bytes belong to none, as safetensors' own reader does."""
    end, before = data_start, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            how = "overlaps" if entry.offset < end else "leaves a gap behind"
            raise DamagedFile(
                f"{file} is damaged: a tensor at byte {entry.offset} {how} {before}, which ends at {end}. Download it "
                "again."
            )
        end, before = entry.offset + entry.nbytes, "the tensor before it"


def _require_indexed(path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    """Raise DamagedFile where a folder's index names tensors that are not in the files that it says."""
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise DamagedFile(
                f"{path}: its index says that {name!r:.199} is in {file}, and it is not. The files do not belong "
                "together: download them again."
            )


def _entry(file: Path, name: str, info: Any, data_start: int, stamp: Stamp) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        if not (isinstance(dtype, str) and dtype.isascii() and dtype.isidentifier() and len(dtype) < MAX_NAME):
            raise ValueError(f"dtype {dtype!r:.99}")
        if len(name) > MAX_NAME or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{len(name)} characters, {len(shape)} dimensions")
        if not all(isinstance(n, int) and 0 <= n < 2**63 for n in (*shape, begin, end)) or begin > end:
            raise ValueError(f"shape {info['shape']!s:.99}, bytes {info['data_offsets']!s:.99}")
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(
            f"{file}: the header entry of {name!r:.99} is damaged ({error}). Download it again."
        ) from error
    if data_start + end > stamp[0]:
        raise DamagedFile(
            f"{file} is cut off: {name!r} ends at byte {data_start + end}, the file has {stamp[0]}. Download it again."
        )
    bits = BITS_PER_ELEMENT.get(dtype)
    if bits is not None and prod(shape) * bits != (end - begin) * 8:
        raise DamagedFile(f"{file}: {name!r} {dtype}{list(shape)} cannot have {end - begin} bytes. Download it again.")
    return TensorEntry(file, data_start + begin, end - begin, dtype, shape, stamp=stamp)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return MissingFile(f"{path} cannot be read ({error}). Check that this user may read it.")
