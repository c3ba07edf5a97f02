"""What lies in the cache folder, as the page shows it, and clearing it: what went, and what could not."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..engine.caches.prompt_cache import Entry, PromptCache
from ..engine.caches.requantized_files import FINISHED, UNUSED, CachedFile, State, cached_files, clear
from ..engine.errors import CacheError
from ..engine.texts import printable
from ..engine.told import Part, Told

UNUSED_WEIGHTS, ALL_WEIGHTS, PROMPTS = "unused", "all", "prompts"
CLEARABLE = (UNUSED_WEIGHTS, ALL_WEIGHTS, PROMPTS)
_STATES = {UNUSED_WEIGHTS: UNUSED, ALL_WEIGHTS: FINISHED}


def shown(folder: Path, prompts: PromptCache) -> list[Part]:
    """The list, a part for each file. What cannot be read is a part too, never an error."""
    odd = [
        Told(
            "{file}, {state}",
            code="weights_list.odd",
            file=printable(f"{prompts.folder.name}/{name}"),
            state=State.FOREIGN.value,
        )
        for name in prompts.odd_names()
    ]
    return [*_weights(folder), *_told(lambda: [_prompts(prompts.entries())]), *odd]


def cleared(folder: Path, prompts: PromptCache, what: str) -> list[Part]:
    """Clear one of CLEARABLE; the list of what is left, what was removed, and what could not be, with the reason."""

    def weights() -> Iterator[Part]:
        done = clear(folder, _STATES[what])
        yield Told("removed: {files}", code="weights_list.removed", files=_count(done.removed))
        yield from map(_line, done.removed)
        yield from (_not_removed(why, _line(file)) for file, why in done.failed)

    def encoded() -> Iterator[Part]:
        done = prompts.clear()
        yield Told("removed {prompts}", code="weights_list.removed_prompts", prompts=_prompts(done.removed))
        yield from (_not_removed(why, printable(entry.path.name)) for entry, why in done.failed)

    done = list(_told(encoded if what == PROMPTS else weights))  # before what is left is listed
    return [*shown(folder, prompts), "", *done]


def _not_removed(why: str, file: Part) -> Told:
    return Told("not removed ({why}): {file}", code="weights_list.not_removed", why=printable(why), file=file)


def _weights(folder: Path) -> Iterator[Part]:
    def lines() -> Iterator[Part]:
        files = cached_files(folder)
        known = _count([file for file in files if file.state is not State.FOREIGN])
        yield Told("{folder}: {files}", code="weights_list.folder", folder=printable(str(folder)), files=known)
        yield from map(_line, files)

    return _told(lines)


def _told(lines: Callable[[], Iterable[Part]]) -> Iterator[Part]:
    """The lines, or the error that ends them."""
    try:
        yield from lines()
    except CacheError as error:
        yield error.saying(" ".join(printable(part) for part in str(error).splitlines() if part))


def _count(files: Sequence[CachedFile]) -> Told:
    if not files:
        return Told("nothing", code="weights_list.nothing")
    return Told(
        "{count} file{plural}, {gb:.2f} GB",
        code="weights_list.files",
        count=len(files),
        plural="" if len(files) == 1 else "s",
        gb=sum(file.nbytes for file in files) / 1e9,
    )


def _prompts(entries: Sequence[Entry]) -> Told:
    if not entries:
        return Told("prompts: none", code="weights_list.no_prompts")
    return Told(
        "prompts: {count}, {mb:.1f} MB",
        code="weights_list.prompts",
        count=len(entries),
        mb=sum(entry.nbytes for entry in entries) / 1e6,
    )


def _line(file: CachedFile) -> Told:
    source = Path(file.source)
    name = f"{source.parent.name}/{source.name}" if file.source and not source.suffix else source.name
    return Told(
        "{file}, {gb:.2f} GB, {made}, {state}",
        code="weights_list.file",
        file=printable(f"{name}, {file.weight_format}" if file.source else file.path.name),
        gb=file.nbytes / 1e9,
        made=_date(file.made),
        state=file.state.value,
    )


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):
        return "at an impossible time"
