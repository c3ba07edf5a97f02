"""JSON that files state: read within bounds, each name once. Knows no file format."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DamagedFile, MissingFile
from .regular_file import Stamp, open_regular, require_unchanged, stamp_of

# of a header or a configuration: Qwen-Image's takes 0.3 MB, 2 MB from bitsandbytes. As JSON it grows 25 times at most
MAX_JSON_BYTES = 16_000_000
MAX_JSON_DEPTH = 16
MAX_JSON_VALUES = 500_000  # a second of reading; a header of 10,000 tensors has 80,000


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's object. Raises MissingFile or DamagedFile."""
    return read_json_with_stamp(file)[0]


def read_json_with_stamp(file: Path) -> tuple[dict[str, Any], Stamp]:
    raw, stamp = read_text(file)
    return parse_json(raw, str(file)), stamp


def read_text(file: Path) -> tuple[bytes, Stamp]:
    """As much of a JSON file as it may have, and one byte more where there is more. Raises MissingFile or
    DamagedFile."""
    try:
        with open_regular(file) as stream:
            stamp = stamp_of(stream)
            raw = stream.read(MAX_JSON_BYTES + 1)
            require_unchanged(stream, file, stamp)
            return raw, stamp
    except OSError as error:
        raise unreadable(file, error) from error


def parse_json(raw: str | bytes, what: str, *, max_values: int = MAX_JSON_VALUES) -> dict[str, Any]:
    """The JSON object that a file states; `what` names the place. Raises DamagedFile, also for one that is too long
    to be held, or too deep to be printed."""
    if len(raw) > MAX_JSON_BYTES:
        raise DamagedFile(
            "{what} has {size} bytes; no model has more than {most}. Download it again.",
            code="json.too_long",
            what=what,
            size=len(raw),
            most=MAX_JSON_BYTES,
        )
    text = raw if isinstance(raw, bytes) else raw.encode(errors="surrogatepass")
    values = sum(text.count(mark) for mark in (b",", b"[", b"{"))  # or more, where texts have such characters
    if values > max_values:
        raise DamagedFile(
            "{what} has {values_count} values; no model has more than {most}. Download it again.",
            code="json.too_many_values",
            what=what,
            values_count=values,
            most=max_values,
        )
    try:
        value = json.loads(raw, object_pairs_hook=_without_doubles)
    except _Double as error:
        raise DamagedFile(
            "{what} names {name!r:.199} twice. Download it again.",
            code="json.name_twice",
            what=what,
            name=error.args[0],
        ) from error
    except (ValueError, RecursionError) as error:
        raise DamagedFile(
            "{what} is not valid JSON ({error}). Download it again.", code="json.not_json", what=what, error=error
        ) from error
    if not isinstance(value, dict):
        raise DamagedFile(
            "{what} is a JSON {kind}, not an object. Download it again.",
            code="json.no_object",
            what=what,
            kind=type(value).__name__,
        )
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for item in level for child in _children(item) if isinstance(child, _CONTAINERS)]
    if level:
        raise DamagedFile(
            "{what} is JSON nested more than {most} levels deep. Download it again.",
            code="json.too_deep",
            what=what,
            most=MAX_JSON_DEPTH,
        )
    return value


def unreadable(path: Path, error: Exception) -> CheckpointError:
    return MissingFile(
        "{file} cannot be read ({error}). Check that your user account may read it.",
        code="file.unreadable",
        file=path,
        error=error,
    )


_CONTAINERS = (dict, list)


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
