"""Decide in which tiles an image is decoded or encoded. Integers in, a TilePlan out; imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import DoesNotFit
from ..texts import size_text
from .tile_geometry import Halo, Network

# beyond 2**31 - 1 values per tensor, kernels with 32-bit indices refuse or fall back to slow ones
MAX_TENSOR_VALUES = 2**31 - 1


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in latents: it writes start to stop, and reads read_start to read_stop."""

    start: int
    stop: int
    read_start: int
    read_stop: int


@dataclass(frozen=True, repr=False)
class TilePlan:
    """Which tiles, and the live bytes they need beside the weights. All tiles together write each latent once."""

    task: str
    width: int
    height: int
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    peak_bytes: int
    limit_bytes: int | None

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def __iter__(self) -> Iterator[tuple[Span, Span]]:
        return ((row, column) for row in self.rows for column in self.columns)

    @property
    def is_whole(self) -> bool:
        return len(self) == 1

    @property
    def work(self) -> float:
        """Pixels computed per pixel of the image; 1.0 without tiles."""
        return _read(self.rows) * _read(self.columns) / (self.rows[-1].stop * self.columns[-1].stop)

    def __repr__(self) -> str:
        limit = "" if self.limit_bytes is None else f" of {size_text(self.limit_bytes)}"
        tiles = "whole image"
        if not self.is_whole:
            tiles = f"{len(self.columns)}x{len(self.rows)} tiles, {self.work:.2f}x the pixels"
        return f"VAE {self.task} {self.width}x{self.height}: {tiles}, {size_text(self.peak_bytes)}{limit}"


def plan_tiles(
    network: Network,
    *,
    task: str,
    size: tuple[int, int],
    itemsize: int,
    result_bytes: int = 0,
    limit_bytes: int | None = None,
    tile_latents: int = 0,
) -> TilePlan:
    """The tiles that compute the fewest pixels twice and stay within the limit.

    * The whole image at once where it fits; strips where they cost less than squares.
    * The plan's peak never exceeds the limit; DoesNotFit is raised where no tile is small enough.
    * `tile_latents` is the most that an inner tile writes along an axis. The result does not depend on it.

    `size` is (height, width) in latents; `result_bytes` is the share of the result that lives on the same device.
    """
    halo = network.halo

    def peak(tile: tuple[int, int]) -> int:
        return result_bytes + network.peak_bytes(size, tile, itemsize)

    best: tuple[int, int, tuple[Span, ...], tuple[Span, ...]] | None = None
    column_choices = _choices(size[1], halo, tile_latents)
    for rows in _choices(size[0], halo, tile_latents):
        for columns in column_choices:
            tile = (_extent(rows), _extent(columns))
            work = _read(rows) * _read(columns)
            if best and work >= best[0]:
                break
            if network.largest_tensor(tile) > MAX_TENSOR_VALUES:
                continue
            if limit_bytes is None or peak(tile) <= limit_bytes:
                best = (work, peak(tile), rows, columns)
                break
    height, width = size[0] * network.scale, size[1] * network.scale
    if best is None:
        least = peak((_extent(_choices(size[0], halo, 1)[-1]), _extent(column_choices[-1])))
        raise DoesNotFit(
            "VAE {task} of {width}x{height} needs {need_bytes} besides its weights, even in the smallest tiles; "
            "{limit_bytes} are available.\nUse a smaller image, or a VRAM limit that is {lacking_bytes} higher.",
            code="plan.vae_does_not_fit",
            task=task,
            width=width,
            height=height,
            need_bytes=least,
            limit_bytes=max(0, limit_bytes or 0),
            lacking_bytes=least - (limit_bytes or 0),
        )
    return TilePlan(task, width, height, best[2], best[3], best[1], limit_bytes)


def split(length: int, parts: int, halo: Halo) -> tuple[Span, ...]:
    """Cut an axis so that every tile reads about the same: those at the border, with one halo, write more."""
    overlap = halo.before + halo.after
    extent = max(overlap + 1, -(-(length + overlap * (parts - 1)) // parts))
    spans, start = [], 0
    while start < length:
        read_start = max(0, start - halo.before)
        read_stop = min(length, read_start + extent)
        stop = length if read_stop == length else read_stop - halo.after
        spans.append(Span(start, stop, read_start, read_stop))
        start = stop
    return tuple(spans)


def _choices(length: int, halo: Halo, tile_latents: int) -> list[tuple[Span, ...]]:
    """Every way to cut an axis that reads less per tile than the ones before it, from one tile to the smallest."""
    overlap = halo.before + halo.after
    largest = tile_latents + overlap if tile_latents else length
    choices: list[tuple[Span, ...]] = []
    for parts in range(1, length + 1):
        spans = split(length, parts, halo)
        if _extent(spans) > largest:
            continue
        if not choices or _extent(spans) < _extent(choices[-1]):
            choices.append(spans)
        if _extent(spans) <= overlap + 1:
            break
    return choices


def _extent(spans: tuple[Span, ...]) -> int:
    return max(span.read_stop - span.read_start for span in spans)


def _read(spans: tuple[Span, ...]) -> int:
    return sum(span.read_stop - span.read_start for span in spans)
