"""Draw plans and reports as plain images: values in, PIL images out. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from math import floor, log10

from PIL import Image, ImageDraw, ImageFont

from ..errors import DoesNotFit
from ..planning.memory_plan import MemoryPlan
from ..planning.request import GIB
from ..planning.stages import ImagePlan, Stage
from .image_report import ImageReport, Sample

WIDTH_PX = 1200
MARGIN_PX = 24
PANEL_COLUMNS = 3
PANEL_HEIGHT_PX = 330
PLOT_HEIGHT_PX = 250
LEAST_SIZE = 10  # of letters, in px
FAR = 3  # a limit that is so many times what was used

WHITE, INK, GREY, FAINT = "#ffffff", "#1d2430", "#667080", "#dfe3ea"
LIMIT = "#c62828"
# of blue, orange and green that stay apart for colour-blind eyes
WEIGHTS, PASSING, ACTIVATIONS = "#3b6fb6", "#e5952e", "#5aa98c"
BANDS = ("#eef2f9", "#dfe7f3")

LABELS = {
    Stage.ENCODE: "encode",
    Stage.LOAD: "load",
    Stage.MODULATION: "table",
    Stage.SAMPLING: "sample",
    Stage.DECODE: "decode",
}


@dataclass(frozen=True)
class Card:
    """A plan for a card of `capacity_bytes`; no plan, but an error, where the image does not fit."""

    name: str
    capacity_bytes: int
    limit_bytes: int
    plan: ImagePlan | None
    weight_format: str = ""
    error: DoesNotFit | None = None

    @property
    def refusal(self) -> str:
        """Why there is no plan; empty where there is one."""
        return "" if self.error is None else str(self.error)


def draw_cards(title: str, subtitle: str, cards: Sequence[Card]) -> Image.Image:
    """A panel for each card: device memory stage by stage under its limit, and what a step takes."""
    rows = -(-len(cards) // PANEL_COLUMNS)
    top = 112
    image = Image.new("RGB", (WIDTH_PX, top + rows * PANEL_HEIGHT_PX + MARGIN_PX), WHITE)
    pen = _Pen(image)
    pen.text(MARGIN_PX, 14, title, size=24)
    pen.text(MARGIN_PX, 46, subtitle, size=pen.fitting(subtitle, 17), fill=GREY)
    x = MARGIN_PX
    for colour, words in (
        (WEIGHTS, "weights that stay"),
        (PASSING, "weights passing through"),
        (ACTIVATIONS, "activations"),
    ):
        pen.box(x, 82, x + 16, 98, colour)
        x = pen.text(x + 24, 80, words, size=17) + 28
    pen.dashes(x, x + 30, 90)
    pen.text(x + 38, 80, "limit", size=17)
    width = (WIDTH_PX - 2 * MARGIN_PX) // PANEL_COLUMNS
    for index, card in enumerate(cards):
        row, column = divmod(index, PANEL_COLUMNS)
        _draw_card(pen, MARGIN_PX + column * width, top + row * PANEL_HEIGHT_PX, width - 20, card)
    return image


def draw_timeline(title: str, report: ImageReport, samples: Sequence[Sample]) -> Image.Image:
    """Device memory and host memory over time, stages marked, limits as lines. Without samples it says so."""
    own = any(sample.vram_bytes is not None for sample in samples)
    plots = 2 if own else 1
    top = 84
    image = Image.new("RGB", (WIDTH_PX, top + plots * (PLOT_HEIGHT_PX + 56) + MARGIN_PX), WHITE)
    pen = _Pen(image)
    pen.text(MARGIN_PX, 14, title, size=24)
    moved = report.moved
    pen.text(
        MARGIN_PX,
        46,
        f"{report.seconds:.1f} s   read from files {moved.file_bytes / GIB:.2f} GiB   over the bus "
        f"{moved.copied_bytes / GIB:.2f} GiB   waited {moved.disk_seconds:.1f} s for the disk, "
        f"{moved.bus_seconds:.1f} s for the bus",
        size=17,
        fill=GREY,
    )
    if not samples:
        pen.text(MARGIN_PX, top + 40, "No stage has run yet.", size=20, fill=LIMIT)
        return image
    limits = report.limits
    before = min((stage.ram_before_bytes for stage in report.stages), default=0)
    if own:
        points = [(sample.seconds, sample.vram_bytes or 0) for sample in samples]
        peaks = [(s.start_seconds, s.seconds, s.vram_bytes or 0) for s in report.stages]
        limit = None if limits is None else limits.vram_bytes
        _draw_plot(pen, top, "VRAM", points, samples, limit, WEIGHTS, peaks)
    ram_limit = None
    if limits is not None and not own:
        ram_limit = min(limits.vram_bytes, limits.ram_bytes or limits.vram_bytes)
    elif limits is not None:
        ram_limit = limits.ram_bytes
    points = [(sample.seconds, sample.ram_bytes) for sample in samples]
    _draw_plot(
        pen,
        top + (plots - 1) * (PLOT_HEIGHT_PX + 56),
        "RAM of this process",
        points,
        samples,
        None if ram_limit is None else before + ram_limit,
        ACTIVATIONS,
        [],
    )
    return image


def _draw_card(pen: "_Pen", x: int, y: int, width: int, card: Card) -> None:
    name_end = pen.text(x, y, card.name, size=21)
    if card.weight_format:
        pen.text(name_end + 12, y + 4, card.weight_format, size=16, fill=GREY)
    left, right, head, foot = x + 46, x + width, y + 34, y + 218
    scale = (foot - head) / card.capacity_bytes
    limit = round(foot - card.limit_bytes * scale)  # no card is given a limit above what it has
    pen.text(left - 6, limit - 9, f"{card.limit_bytes / GIB:.2f}", size=14, fill=LIMIT, right=True)
    for quarter in range(5):
        level = foot - quarter * (foot - head) // 4
        pen.line(left, level, right, level, FAINT)
        if abs(level - limit) > 12:  # else the limit's number stands there
            number = f"{quarter * card.capacity_bytes / 4 / GIB:.3g}{' GiB' if quarter == 4 else ''}"
            pen.text(left - 6, level - 9, number, size=14, fill=GREY, right=True)
    if card.plan is None:
        pen.dashes(left, right, limit)
        pen.paragraph(left + 8, head + 20, card.refusal, right - left - 16, size=16, fill=LIMIT)
        return
    stages = card.plan.stages
    pitch = (right - left) / len(stages)
    for index, stage in enumerate(stages):
        middle = left + (index + 0.5) * pitch
        begin, end = round(middle - pitch * 0.3), round(middle + pitch * 0.3)
        level, held = foot, 0
        for nbytes, colour in (
            (stage.weights_bytes, WEIGHTS),
            (stage.passing_bytes, PASSING),
            (stage.activation_bytes, ACTIVATIONS),
        ):
            held += nbytes
            above = round(foot - held * scale)
            if above < level:
                pen.box(begin, above, end, level, colour)
            level = above
        # beside the limit's line, not across it
        at = level - 20 if not limit - 4 < level - 2 < limit + 22 else limit - 20
        pen.text(round(middle), at, f"{stage.peak_bytes / GIB:.2f}", size=14, centre=True)
        pen.text(round(middle), foot + 4, LABELS[stage.stage], size=15, fill=GREY, centre=True)
    pen.dashes(left, right, limit)
    plan, forecast = card.plan, card.plan.sampling.forecast
    pen.text(x, foot + 26, f"{forecast.seconds:.1f} s per step, bound by {forecast.bound.value}", size=17)
    where = f"{len(plan.sampling.resident)} blocks stay, {len(plan.sampling.held)} in RAM"
    pen.text(x, foot + 48, f"{where}, {plan.sampling.from_file} from the file at each step", size=15, fill=GREY)
    tiles = "VAE whole" if plan.tiles.is_whole else f"VAE in {len(plan.tiles)} tiles"
    pen.text(
        x,
        foot + 67,
        f"RAM {plan.ram_bytes / GIB:.1f} GiB, {tiles}, {_duration(plan.seconds)}, then {_duration(plan.again_seconds)}",
        size=15,
        fill=GREY,
    )
    pen.text(x, foot + 86, _further(plan.sampling), size=15, fill=GREY)


def _further(plan: MemoryPlan) -> str:
    """What sampling takes of other cards at the most; empty where there is one."""
    if not plan.further:
        return ""
    widest = max(plan.further, key=lambda other: other.peak_bytes)
    name = widest.device if len(plan.further) == 1 else f"{len(plan.further)} further cards, at most"
    return f"{name}: {widest.peak_bytes / GIB:.2f} of {widest.limit_bytes / GIB:.2f} GiB"


def _draw_plot(
    pen: "_Pen",
    y: int,
    name: str,
    points: Sequence[tuple[float, int]],
    samples: Sequence[Sample],
    limit: int | None,
    colour: str,
    peaks: Sequence[tuple[float, float, int]],
) -> None:
    """`peaks`: of each stage, when it began, how long it took, and its highest value, also between the samples."""
    left, right, head, foot = MARGIN_PX + 56, WIDTH_PX - MARGIN_PX, y + 44, y + PLOT_HEIGHT_PX
    begin, end = points[0][0], max(points[-1][0], points[0][0] + 0.001)
    highest = max(1, *(value for _, value in points), *(peak for _, _, peak in peaks))
    beyond = limit is not None and limit > FAR * highest  # on one axis with it, nothing else could be read
    top = highest * 1.25 if limit is None or beyond else max(highest, limit) * 1.08

    def at(seconds: float, value: float) -> tuple[int, int]:
        return (
            round(left + (seconds - begin) / (end - begin) * (right - left)),
            round(foot - value / top * (foot - head)),
        )

    free_from = 0
    for index, (stage, visit) in enumerate(groupby(samples, key=lambda sample: sample.stage)):
        times = [sample.seconds for sample in visit]
        first, last = at(times[0], 0)[0], at(times[-1], 0)[0]
        pen.box(first, head, max(last, first + 2), foot, BANDS[index % 2])
        start = min(max(first + 3, free_from), right - pen.width(LABELS[stage], 15))
        free_from = pen.text(start, head - 20, LABELS[stage], size=15, fill=GREY) + 8
    for gib in _ticks(top / GIB):
        level = at(begin, gib * GIB)[1]
        pen.line(left, level, right, level, FAINT)
        pen.text(left - 8, level - 9, f"{gib:g}", size=14, fill=GREY, right=True)
    name_end = pen.text(MARGIN_PX, y, f"{name}, GiB", size=18)
    steps: list[tuple[int, int]] = []
    for seconds, value in points:
        x, level = at(seconds, value)
        if steps:
            steps.append((x, steps[-1][1]))
        steps.append((x, level))
    pen.path(steps, colour)
    for begun, seconds, peak in peaks:
        x, level = at(min(max(begun, begin), end), peak)
        pen.line(x, level, max(at(min(begun + seconds, end), 0)[0], x + 2), level, INK)
    if limit is not None:
        level = head if beyond else at(begin, limit)[1]
        pen.dashes(left, right, level)
        words = f"limit {limit / GIB:.2f}" + (", far above this axis" if beyond else "")
        name_end = pen.text(name_end + 20, y + 2, words, size=16, fill=LIMIT)
    if peaks:
        pen.text(name_end + 20, y + 2, "black: highest in each stage", size=16, fill=GREY)
    for seconds in _ticks(end - begin):
        pen.text(at(begin + seconds, 0)[0], foot + 4, f"{seconds:g} s", size=14, fill=GREY, centre=True)


def _ticks(top: float) -> list[float]:
    """From 0 to `top`, at most seven, at steps of 1, 2 or 5 times a power of ten."""
    power = 10 ** floor(log10(top / 6))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 6 >= top)
    return [round(i * step, 9) for i in range(int(top / step) + 1)]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class _Pen:
    """Draws on one image, in px; text in the font that Pillow brings."""

    def __init__(self, image: Image.Image) -> None:
        self._draw = ImageDraw.Draw(image)

    def text(
        self,
        x: int,
        y: int,
        text: str,
        *,
        size: int,
        fill: str = INK,
        right: bool = False,
        centre: bool = False,
    ) -> int:
        """From x on, or ending there, or around it; returns where it ends."""
        width = self.width(text, size)
        x -= width if right else width // 2 if centre else 0
        self._draw.text((x, y), text, font=_font(size), fill=fill)
        return x + width

    def width(self, text: str, size: int) -> int:
        return round(self._draw.textlength(text, font=_font(size)))

    def fitting(self, text: str, size: int) -> int:
        """That size, or the largest below in which a line is not cut off."""
        room = WIDTH_PX - 2 * MARGIN_PX
        return next((fit for fit in range(size, LEAST_SIZE, -1) if self.width(text, fit) <= room), LEAST_SIZE)

    def paragraph(self, x: int, y: int, text: str, width: int, *, size: int, fill: str) -> None:
        line = ""
        for word in text.split():
            longer = f"{line} {word}".strip()
            if line and self.width(longer, size) > width:
                self.text(x, y, line, size=size, fill=fill)
                y, longer = y + size + 4, word
            line = longer
        self.text(x, y, line, size=size, fill=fill)

    def box(self, left: int, top: int, right: int, bottom: int, fill: str) -> None:
        self._draw.rectangle((left, top, right, bottom), fill=fill)

    def line(self, x: int, y: int, to_x: int, to_y: int, fill: str) -> None:
        self._draw.line((x, y, to_x, to_y), fill=fill, width=2 if fill == INK else 1)

    def path(self, points: Sequence[tuple[int, int]], fill: str) -> None:
        self._draw.line(list(points), fill=fill, width=3)

    def dashes(self, left: int, right: int, y: int) -> None:
        for x in range(left, right, 12):
            self._draw.line((x, y, min(x + 7, right), y), fill=LIMIT, width=2)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
