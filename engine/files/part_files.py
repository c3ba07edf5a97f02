"""Which files hold one model in parts, by their names: `m-00001-of-00009.safetensors`, .gguf. Opens no file."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import MissingFile

MAX_PARTS = 1000  # Qwen-Image's transformer has nine
_NAMES_SHOWN = 5
# as transformers, diffusers, llama.cpp's gguf-split and the gguf package write it
_PART = re.compile(r"(?P<stem>.+)(?P<dash>[-_.])(?P<number>\d{1,6})(?P<of>[-_.]of[-_.])(?P<count>\d{1,6})", re.I)


@dataclass(frozen=True)
class Part:
    """What a file's name says: `stem`, part `number` of `count`; `form` spells the names of the others."""

    stem: str
    number: int
    count: int
    form: str

    @classmethod
    def of(cls, path: Path) -> "Part | None":
        """None for a name that says nothing of parts."""
        match = _PART.fullmatch(path.stem)
        if match is None:
            return None
        number, count = int(match["number"]), int(match["count"])
        if not 0 <= number <= count <= MAX_PARTS or count < 1:
            return None
        digits = f"{{:0{len(match['number'])}d}}"
        stem, rest = match["stem"], f"{match['of']}{match['count']}{path.suffix}"
        return cls(stem, number, count, f"{_literal(stem + match['dash'])}{digits}{_literal(rest)}")

    def name(self, number: int) -> str:
        return self.form.format(number)


def parts_of(path: Path) -> list[Path]:
    """All parts of what `path` is one of, in order; itself alone where its name says nothing of parts.

    Raises MissingFile, with the others' names, where not all of them lie beside it.
    """
    part = Part.of(path)
    if part is None:
        return [path]
    first = 0 if path.with_name(part.name(0)).exists() else 1  # some programs count from 0
    files = [path.with_name(part.name(first + i)) for i in range(part.count)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        more = f" and {len(missing) - _NAMES_SHOWN} more" if len(missing) > _NAMES_SHOWN else ""
        raise MissingFile(
            "{file} is part {number} of {count}; missing: {missing}{more}. Put them beside it, in {folder}: "
            "they are read together.",
            code="file.parts_missing",
            file=path,
            number=part.number + 1 - first,
            count=part.count,
            missing=missing[:_NAMES_SHOWN],
            more=more,
            folder=path.parent,
        )
    return files


def stem_of(path: Path) -> str:
    """The file's name without its ending, and without what tells its part."""
    part = Part.of(path)
    return path.stem if part is None else part.stem


def without_later_parts(names: Iterable[str]) -> list[str]:
    """The names, of each set of parts the first that is there."""
    listed = sorted(names)
    first: dict[tuple[Path, Part], int] = {}
    for name in listed:
        if (part := Part.of(path := Path(name))) is not None:
            key = path.parent, replace(part, number=0)
            first[key] = min(part.number, first.get(key, part.number))
    return [name for name in listed if _is_first(Path(name), first)]


def _is_first(path: Path, first: dict[tuple[Path, Part], int]) -> bool:
    part = Part.of(path)
    return part is None or first[path.parent, replace(part, number=0)] == part.number


def _literal(text: str) -> str:
    """The text as a part of a format."""
    return text.replace("{", "{{").replace("}", "}}")
