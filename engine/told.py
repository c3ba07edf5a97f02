"""Sentences with a code and values beside their English text, and tables, from which a page tells them in its language.

Such texts stand in locales/en/errors.json, with those of errors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from .texts import printable, size_text

_LONGEST_VALUE = 4096  # characters: as many as a path may have
_MOST_ITEMS = 100  # of a list


class Coded:
    """What has a code and values beside its English text, so that it can be said in another language.

    text: with {name} where a value stands, and format specifications as in str.format. Whole numbers whose name ends
    in _bytes are shown as sizes (1.58 GiB), lists of texts with commas between.
    code: one for each text. It stays when the text is improved.
    values: what the text names. Numbers, texts and lists of them stay what they are, up to a length; of another coded
    text its code, values and text are kept, of all else its text.
    """

    code: str
    values: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"code": self.code, "values": self.values, "text": str(self)}


class Told(Coded):
    """A sentence, or a part of one."""

    def __init__(self, text: str, /, *, code: str, **values: Any) -> None:
        self.code, self.values = code, plain(values)
        self._text = filled(text, values)

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True)
class Table:
    """Rows of as many cells each; the first one has the columns' titles."""

    rows: tuple[tuple[str, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"rows": [list(row) for row in self.rows]}

    def __str__(self) -> str:
        """A line for each row, columns below each other."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        cells = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in self.rows)
        return "\n".join("  ".join(row).rstrip() for row in cells)


Part = str | Coded | Table  # of a longer text; a text is the same in every language


def text_of(parts: Iterable[Part]) -> str:
    """In English, a part below the other."""
    return "\n".join(map(str, parts))


def json_of(parts: Iterable[Part]) -> list[Any]:
    """What a page tells the same from, in its own language."""
    return [part if isinstance(part, str) else part.as_dict() for part in parts]


def filled(text: str, values: Mapping[str, Any]) -> str:
    """The text with its values, printable."""
    return printable(text.format_map({name: _shown(name, value) for name, value in values.items()}), lines=True)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON has them."""
    return {name: _plain(value) for name, value in values.items()}


class _Texts(list[str]):
    def __format__(self, specification: str) -> str:
        return format(", ".join(self), specification)


def _shown(name: str, value: Any) -> Any:
    if name.endswith("_bytes") and isinstance(value, int):
        return size_text(value)
    texts = isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value)
    return _Texts(value) if texts else value


def _plain(value: Any) -> Any:
    if isinstance(value, Coded):
        return value.as_dict()
    if isinstance(value, list | tuple):
        return [_plain_item(item) for item in value[:_MOST_ITEMS]]
    return _plain_item(value)


def _plain_item(value: Any) -> Any:
    if value is None or isinstance(value, int) or (isinstance(value, float) and isfinite(value)):
        return value
    return printable(str(value)[:_LONGEST_VALUE], lines=True)
