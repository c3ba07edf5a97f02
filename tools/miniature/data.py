"""Own the synthetic world: scenes, their captions, their images, and which combinations are never trained on."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from itertools import product

import numpy as np

COLOURS = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 228, 50),
    "green": (30, 155, 60),
    "blue": (35, 75, 215),
    "purple": (145, 45, 175),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle")
SIZES = ("large", "small")
PLACES = ("centre", "left", "right", "top", "bottom")  # of a single shape, in the image
RELATIONS = ("left", "right", "above", "below")  # of the first shape to the second
LANGUAGES = ("en", "zh")

HELD_OUT_PART = 8  # one (shape, colour, background) in this many is never trained on
DIAMETERS = {"large": (0.36, 0.4), "small": (0.19, 0.22)}  # fractions of the image's side
SINGLE_JITTER, PAIR_JITTER = 0.02, 0.012
NEAR, FAR = 0.255, 0.745

CHINESE = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
    "black": "黑色", "white": "白色", "circle": "圆形", "square": "正方形", "triangle": "三角形",
    "large": "大", "small": "小", "transparent": "透明",
}  # fmt: skip
ENGLISH_PLACES = {
    "centre": ("in the centre", "in the center", "in the middle"),
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
CHINESE_PLACES = {
    "centre": ("中央", "中间"),
    "left": ("左侧", "左边"),
    "right": ("右侧", "右边"),
    "top": ("顶部",),
    "bottom": ("底部",),
}
ENGLISH_RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
CHINESE_RELATIONS = {
    "left": ("左边", "左侧"),
    "right": ("右边", "右侧"),
    "above": ("上方",),
    "below": ("下方",),
}


@dataclass(frozen=True)
class Item:
    """One shape; `size` None means that the caption does not say."""

    shape: str
    colour: str
    size: str | None


@dataclass(frozen=True)
class Scene:
    """What a caption states: one item at `place` (PLACES, None: not said), or two with `place` from RELATIONS."""

    background: str
    items: tuple[Item, ...]
    place: str | None


def is_held_out(item: Item, background: str) -> bool:
    """True for the (shape, colour, background) combinations that no training image contains, whatever else it shows.

    Chosen by a fixed order (a hash), not by a seed: training and test agree on every machine.
    """
    return (item.shape, item.colour, background) in HELD_OUT


def _choose_held_out() -> frozenset[tuple[str, str, str]]:
    combinations = [c for c in product(SHAPES, COLOURS, COLOURS) if c[1] != c[2]]
    ordered = sorted(combinations, key=lambda c: hashlib.sha256(" ".join(c).encode()).digest())
    return frozenset(ordered[: len(combinations) // HELD_OUT_PART])


HELD_OUT = _choose_held_out()


def draw_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """Return a random scene with every fact stated: with a held-out combination in it, or with none at all."""
    while True:
        background = rng.choice(tuple(COLOURS))
        count = rng.choice((1, 2))
        colours = rng.sample([c for c in COLOURS if c != background], count)
        items = tuple(Item(rng.choice(SHAPES), colour, rng.choice(SIZES)) for colour in colours)
        place = rng.choice(PLACES if count == 1 else RELATIONS)
        if any(is_held_out(item, background) for item in items) == held_out:
            return Scene(background, items, place)


def forget_some_facts(scene: Scene, rng: random.Random, *, probability: float = 0.15) -> Scene:
    """Return the scene as a shorter caption states it: sizes left out, and the centre, where a single shape is then."""
    items = tuple(Item(i.shape, i.colour, None if rng.random() < probability else i.size) for i in scene.items)
    unsaid = scene.place == "centre" and rng.random() < 2 * probability
    return Scene(scene.background, items, None if unsaid else scene.place)


def caption(scene: Scene, language: str, rng: random.Random) -> str:
    """Return one wording of the scene's facts, `en` or `zh`."""
    return {"en": _english, "zh": _chinese}[language](scene, rng)


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _english(scene: Scene, rng: random.Random) -> str:
    names = [_article(" ".join(filter(None, (i.size, i.colour, i.shape)))) for i in scene.items]
    background = _article(f"{scene.background} background")
    first = rng.random() < 0.3
    if scene.place is None:
        what = names[0]
    elif len(scene.items) == 2:
        what = f"{names[0]} {rng.choice(ENGLISH_RELATIONS[scene.place])} {names[1]}"
    else:
        place = rng.choice(ENGLISH_PLACES[scene.place])
        if not first:
            return f"{names[0]} {place} of {background}"
        what = f"{names[0]} {place}"
    return f"on {background}, {what}" if first else f"{what} on {background}"


def _chinese(scene: Scene, rng: random.Random) -> str:
    names = ["".join(CHINESE[w] for w in (i.size, i.colour, i.shape) if w) for i in scene.items]
    background = f"{CHINESE[scene.background]}背景"
    if scene.place is None:
        return f"{background}上的{names[0]}"
    if len(scene.items) == 2:
        comma = rng.choice(("上，", "上"))
        at, of = rng.choice((("在", "的"), ("位于", "")))
        return f"{background}{comma}{names[0]}{at}{names[1]}{of}{rng.choice(CHINESE_RELATIONS[scene.place])}"
    place = rng.choice(CHINESE_PLACES[scene.place])
    return rng.choice((f"{background}{place}的{names[0]}", f"{background}上，{place}有一个{names[0]}"))


def held_out_captions(count: int, *, seed: int = 0) -> list[tuple[str, str, Scene]]:
    """Return (language, caption, facts) with every fact stated and a held-out combination in each; no scene twice."""
    rng = random.Random(f"held out {seed}")
    found: dict[Scene, tuple[str, str, Scene]] = {}
    while len(found) < count:
        scene = draw_scene(rng, held_out=True)
        if scene not in found:
            language = LANGUAGES[len(found) % 2]
            found[scene] = (language, caption(scene, language, rng), scene)
    return list(found.values())


def paint(scene: Scene, rng: random.Random, *, side_px: int = 128) -> np.ndarray:
    """Return the scene as (side_px, side_px, 3) uint8: flat colours, antialiased edges, a little room for chance."""
    centres, jitter = locate(scene)
    image = np.empty((side_px, side_px, 3), np.float32)
    image[:] = COLOURS[scene.background]
    for item, (x, y) in zip(scene.items, centres, strict=True):
        x, y = (v + rng.uniform(-jitter, jitter) for v in (x, y))
        diameter = rng.uniform(*DIAMETERS[item.size or rng.choice(SIZES)])
        coverage = cover(item.shape, x * side_px, y * side_px, diameter * side_px, (side_px, side_px))[..., None]
        image += coverage * (np.asarray(COLOURS[item.colour], np.float32) - image)
    return image.round().astype(np.uint8)


def locate(scene: Scene) -> tuple[list[tuple[float, float]], float]:
    """Return the items' centres (x, y) and how far off, to each side, an image may have them; in parts of its side."""
    middle = 0.5
    if len(scene.items) == 2:
        near, far = (NEAR, FAR) if scene.place in ("left", "above") else (FAR, NEAR)
        if scene.place in ("left", "right"):
            return [(near, middle), (far, middle)], PAIR_JITTER
        return [(middle, near), (middle, far)], PAIR_JITTER
    places = {"left": (NEAR, middle), "right": (FAR, middle), "top": (middle, NEAR), "bottom": (middle, FAR)}
    return [places.get(scene.place or "centre", (middle, middle))], SINGLE_JITTER


def cover(shape: str, x_px: float, y_px: float, diameter_px: float, size_px: tuple[int, int]) -> np.ndarray:
    """Return how much of each pixel the shape covers, (height, width) in 0..1, its bounding box centred at x, y."""
    height, width = size_px
    dx = np.arange(width, dtype=np.float32)[None] + 0.5 - x_px
    dy = np.arange(height, dtype=np.float32)[:, None] + 0.5 - y_px
    radius = diameter_px / 2
    if shape == "circle":
        inside = radius - np.hypot(dx, dy)
    elif shape == "square":
        inside = radius - np.maximum(np.abs(dx), np.abs(dy))
    elif shape == "triangle":  # upright, as high as it is wide: the sides fall two pixels in one
        inside = np.minimum(radius - dy, (radius + dy - 2 * np.abs(dx)) / 5**0.5)
    else:
        raise ValueError(f"Unknown shape {shape!r}: expected one of {SHAPES}.")
    return np.clip(inside + 0.5, 0, 1)
