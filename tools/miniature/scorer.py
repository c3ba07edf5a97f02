"""Say what an image shows by classical image analysis: no network, no weights, nothing of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy import ndimage

from .data import COLOURS, SHAPES, Item, Scene, cover

Colours = Mapping[str, tuple[int, int, int]]

FOREGROUND_DISTANCE = 60  # of 441: less is antialiasing, or a background that is not quite flat
SPECK = 0.0025  # part of the image: smaller foreground is noise, larger is one shape too many
LARGE = 0.29  # diameter as part of the shorter side: between the large (0.36) and the small (0.22)
OVERLAP = 0.72  # least intersection over union with the ideal shape, which must also beat the two others
OFF_CENTRE = 0.12
STAYED = 0.025  # of the side, 3 of 128 px: what an edit leaves may be off in place and diameter by as much


@dataclass(frozen=True)
class Found:
    """One shape in the image; `shape` is None if it is none of the known; x, y and diameter in 0..1."""

    shape: str | None
    colour: str
    size: str
    x: float
    y: float
    diameter: float


@dataclass(frozen=True)
class Verdict:
    """Which facts are right; `correct` only if all of them are."""

    facts: dict[str, bool]
    found: tuple[Found, ...]
    background: str

    @property
    def correct(self) -> bool:
        return all(self.facts.values())


def name_colour(rgb: Sequence[float], colours: Colours = COLOURS) -> str:
    """Return the nearest of the named colours."""
    return min(colours, key=lambda name: float(np.sum((np.asarray(colours[name], float) - np.asarray(rgb)) ** 2)))


def describe(image: np.ndarray, colours: Colours = COLOURS) -> tuple[str, tuple[Found, ...]]:
    """Return the background's colour and the shapes on it, largest first. `image` is (H, W, 3) uint8."""
    image = np.asarray(image, np.float32)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    ground = np.median(border, axis=0)
    foreground = np.linalg.norm(image - ground, axis=-1) > FOREGROUND_DISTANCE
    labels, _ = ndimage.label(foreground, structure=np.ones((3, 3)))
    parts = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[box] == label
        if mask.sum() > SPECK * foreground.size:
            parts.append((int(mask.sum()), _describe_part(image, mask, box, ground, colours)))
    parts.sort(key=lambda part: -part[0])
    return name_colour(ground, colours), tuple(found for _, found in parts)


def _describe_part(
    image: np.ndarray, mask: np.ndarray, box: tuple[slice, slice], ground: np.ndarray, colours: Colours
) -> Found:
    core = ndimage.binary_erosion(mask, iterations=2)
    rgb = np.median(image[box][core if core.any() else mask], axis=0)
    along = (image[box] - ground) @ (rgb - ground) / np.sum((rgb - ground) ** 2)
    mask = mask & (along > 0.5)  # the edge is where half of the contrast is, however soft it is
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = mask.shape
    y = (box[0].start + rows[0] + height / 2) / image.shape[0]
    x = (box[1].start + columns[0] + width / 2) / image.shape[1]
    diameter = (height * width) ** 0.5 / min(image.shape[:2])
    return Found(_name_shape(mask), name_colour(rgb, colours), "large" if diameter > LARGE else "small", x, y, diameter)


def _name_shape(mask: np.ndarray) -> str | None:
    height, width = mask.shape
    if not 0.75 < width / height < 1.33:
        return None
    side = max(height, width)
    overlaps = {}
    for shape in SHAPES:
        ideal = cover(shape, side / 2, side / 2, side, (side, side)) > 0.5
        rows, columns = (np.arange(n) * side // n for n in (height, width))
        ideal = ideal[np.ix_(rows, columns)]
        overlaps[shape] = (mask & ideal).sum() / (mask | ideal).sum()
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] > OVERLAP else None


def score(image: np.ndarray, scene: Scene, colours: Colours = COLOURS) -> Verdict:
    """Compare the image with the facts: background, count, and for every item shape, colour, size and place.

    A fact that the scene leaves open (None) is not asked. If two shapes are there, each is held against the item it
    agrees with best.
    """
    background, found = describe(image, colours)
    facts = {"background": background == scene.background, "count": len(found) == len(scene.items)}
    if not facts["count"]:
        wrong = dict.fromkeys(("shape", "colour", "size", "place"), False)
        return Verdict(facts | wrong, found, background)
    verdicts = [_compare(order, scene) for order in permutations(found)]
    return Verdict(facts | max(verdicts, key=lambda v: sum(v.values())), found, background)


def score_edit(image: np.ndarray, target: Scene, kept: np.ndarray, colours: Colours = COLOURS) -> Verdict:
    """Compare the image with the scene wanted, and its shapes' places and diameters with those in the image `kept`:
    whether all have `stayed`."""
    verdict, (_, before) = score(image, target, colours), describe(kept, colours)
    stayed = len(before) == len(verdict.found) and any(
        all(_stayed(was, now) for was, now in zip(before, order, strict=True)) for order in permutations(verdict.found)
    )
    return Verdict(verdict.facts | {"stayed": stayed}, verdict.found, verdict.background)


def _stayed(was: Found, now: Found) -> bool:
    return max(abs(was.x - now.x), abs(was.y - now.y), abs(was.diameter - now.diameter)) < STAYED


def _compare(found: Sequence[Found], scene: Scene) -> dict[str, bool]:
    pairs: list[tuple[Found, Item]] = list(zip(found, scene.items, strict=True))
    return {
        "shape": all(f.shape == i.shape for f, i in pairs),
        "colour": all(f.colour == i.colour for f, i in pairs),
        "size": all(i.size in (None, f.size) for f, i in pairs),
        "place": scene.place in (None, _place(found)),
    }


def _place(found: Sequence[Found]) -> str:
    if len(found) == 2:
        dx, dy = found[0].x - found[1].x, found[0].y - found[1].y
        names = ("left", "right", "above", "below")
    else:
        dx, dy = found[0].x - 0.5, found[0].y - 0.5
        names = ("left", "right", "top", "bottom")
    if max(abs(dx), abs(dy)) < OFF_CENTRE:
        return "centre"
    if abs(dx) > abs(dy):
        return names[0] if dx < 0 else names[1]
    return names[2] if dy < 0 else names[3]
