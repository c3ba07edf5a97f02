"""Notes that a file keeps in small tensors beside the weights they describe: JSON as bytes. Reads those, no weight."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DamagedFile, MissingFile
from ..files.checkpoint import TensorEntry
from ..files.json_texts import parse_json
from ..files.regular_file import open_regular, require_unchanged

MAX_NOTE_BYTES = 4096


def read_notes(entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, Any]]:
    """The JSON objects in small tensors, in the order in which they lie in their files.

    Raises DamagedFile for what is longer or no such object, MissingFile where a file cannot be read.
    """
    result: dict[str, dict[str, Any]] = {}
    files: dict[Path, list[str]] = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.nbytes > MAX_NOTE_BYTES:
            raise DamagedFile(
                "{file}: {name!r} has {size} bytes, which is too many. Download it again.",
                code="comfy_quant.note_too_long",
                file=entry.file,
                name=name,
                size=entry.nbytes,
            )
        files.setdefault(entry.file, []).append(name)
    for file, names in files.items():
        try:
            with open_regular(file) as stream:
                for name in names:
                    stream.seek(entries[name].offset)
                    result[name] = parse_json(stream.read(entries[name].nbytes), f"{file}: {name!r}")
                require_unchanged(stream, file, entries[names[0]].stamp)
        except OSError as error:
            raise MissingFile(
                "{file} cannot be read ({error}). Check that your user account may read it.",
                code="file.unreadable",
                file=file,
                error=error,
            ) from error
    return result
