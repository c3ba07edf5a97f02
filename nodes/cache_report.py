"""What lies in the cache folder, as the page shows it, and clearing it: what went, and what could not."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..engine.caches.prompt_cache import Entry, PromptCache
from ..engine.caches.requantized_files import FINISHED, UNUSED, CachedFile, State, cached_files, clear
from ..engine.errors import CacheError
from ..engine.texts import printable

UNUSED_WEIGHTS, ALL_WEIGHTS, PROMPTS = "unused", "all", "prompts"
CLEARABLE = (UNUSED_WEIGHTS, ALL_WEIGHTS, PROMPTS)
_STATES = {UNUSED_WEIGHTS: UNUSED, ALL_WEIGHTS: FINISHED}


def shown(folder: Path, prompts: PromptCache) -> str:
    """The list, one line for each file. What cannot be read is a line too, never an error."""
    odd = [f"{prompts.folder.name}/{name}, {State.FOREIGN.value}" for name in prompts.odd_names()]
    return "\n".join([*_weights(folder), *_told(lambda: [_prompts(prompts.entries())]), *odd])


def cleared(folder: Path, prompts: PromptCache, what: str) -> str:
    """Clear one of CLEARABLE; the list of what is left, what was removed, and what could not be, with the reason."""

    def weights() -> Iterator[str]:
        done = clear(folder, _STATES[what])
        yield f"removed: {_count(done.removed)}"
        yield from map(_line, done.removed)
        yield from (f"not removed ({printable(why)}): {_line(file)}" for file, why in done.failed)

    def encoded() -> Iterator[str]:
        done = prompts.clear()
        yield f"removed {_prompts(done.removed)}"
        yield from (f"not removed ({printable(why)}): {printable(entry.path.name)}" for entry, why in done.failed)

    lines = list(_told(encoded if what == PROMPTS else weights))
    return "\n".join([shown(folder, prompts), "", *lines])


def _weights(folder: Path) -> Iterator[str]:
    def lines() -> Iterator[str]:
        files = cached_files(folder)
        yield f"{printable(str(folder))}: {_count([file for file in files if file.state is not State.FOREIGN])}"
        yield from map(_line, files)

    return _told(lines)


def _told(lines: Callable[[], Iterator[str] | list[str]]) -> Iterator[str]:
    """The lines, or the error that ends them."""
    try:
        yield from lines()
    except CacheError as error:
        yield " ".join(printable(part) for part in str(error).splitlines() if part)


def _count(files: Sequence[CachedFile]) -> str:
    if not files:
        return "nothing"
    return f"{len(files)} {'file' if len(files) == 1 else 'files'}, {sum(f.nbytes for f in files) / 1e9:.2f} GB"


def _prompts(entries: Sequence[Entry]) -> str:
    if not entries:
        return "prompts: none"
    return f"prompts: {len(entries)}, {sum(entry.nbytes for entry in entries) / 1e6:.1f} MB"


def _line(file: CachedFile) -> str:
    source = Path(file.source)
    name = f"{source.parent.name}/{source.name}" if file.source and not source.suffix else source.name
    known = f"{name}, {file.weight_format}" if file.source else file.path.name
    return f"{printable(known)}, {file.nbytes / 1e9:.2f} GB, {_date(file.made)}, {file.state.value}"


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):
        return "at an impossible time"
