"""Own the world of 2.1's miniature: one large shape in an image, whose background may be transparent."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from .data import COLOURS, DIAMETERS, LANGUAGES, Scene, cover, draw_scene, locate
from .data import caption as wording
from .edits import Edit, Order, draw_edit, instruction, order_of
from .scorer import Verdict, score, score_edit

SIDE_PX = 64
SIZE = "large"  # of the one shape: sixteen tokens of 16 px have no more to say
TRANSPARENT = "transparent"
UNDERNEATH = (255, 255, 255)  # of pixels that nothing covers
SEEN_THROUGH = (0, 255, 255)  # the scorer lays images on this: as far from every colour as they are from one another
SEEN = {**COLOURS, TRANSPARENT: SEEN_THROUGH}
TRANSPARENT_PART = 0.2  # of what is trained on
KINDS = ("shape", "background")

ENGLISH_REMOVALS = ("remove the background", "Remove the background", "make the background transparent")
CHINESE_REMOVALS = ("去掉背景", "把背景变成透明", "把背景去掉")


def _fits(scene: Scene) -> bool:
    return [item.size for item in scene.items] == [SIZE]


def _draw(rng: random.Random, *, held_out: bool) -> Scene:
    while not _fits(scene := draw_scene(rng, held_out=held_out)):
        pass
    return scene


def draw(rng: random.Random) -> Scene:
    """Return a scene to train on."""
    scene = _draw(rng, held_out=False)
    return replace(scene, background=TRANSPARENT) if rng.random() < TRANSPARENT_PART else scene


def _draw_edit(rng: random.Random, kind: str, *, held_out: bool) -> Edit:
    while not _fits((edit := draw_edit(rng, kind, held_out=held_out)).target):
        pass
    return edit


def draw_rgba_edit(rng: random.Random) -> Edit:
    """Return an edit of one image to train on: of a shape's colour or of the background, which may be, and become,
    transparent."""
    edit = _draw_edit(rng, rng.choice(KINDS), held_out=False)
    if rng.random() >= (2 if edit.kind == "background" else 1) * TRANSPARENT_PART:
        return edit
    clear = _clear(edit)
    return clear.back if edit.kind == "background" and rng.random() < 0.4 else clear


def _clear(edit: Edit) -> Edit:
    """The edit whose result is on nothing, and whose source is, too, if the background stays."""
    (source,) = edit.sources
    if edit.kind == "shape":
        source = replace(source, background=TRANSPARENT)
    return replace(edit, sources=(source,), target=replace(edit.target, background=TRANSPARENT))


def word(order: Order, language: str, rng: random.Random) -> str:
    """Return one wording of the order, `en` or `zh`."""
    if order.kind == "background" and order.wanted == TRANSPARENT:
        return rng.choice(CHINESE_REMOVALS if language == "zh" else ENGLISH_REMOVALS)
    return instruction(order, language, rng)


def paint(scene: Scene, rng: random.Random, *, side_px: int = SIDE_PX) -> np.ndarray:
    """Return the scene as (side_px, side_px, 4) uint8: as opaque as shapes and background cover the pixels."""
    clear = scene.background == TRANSPARENT
    centres, jitter = locate(scene)
    image = np.empty((side_px, side_px, 4), np.float32)
    image[:] = (*UNDERNEATH, 0) if clear else (*COLOURS[scene.background], 255)
    for item, (x, y) in zip(scene.items, centres, strict=True):
        x, y = (v + rng.uniform(-jitter, jitter) for v in (x, y))
        diameter = rng.uniform(*DIAMETERS[item.size or SIZE])
        coverage = cover(item.shape, x * side_px, y * side_px, diameter * side_px, (side_px, side_px))[..., None]
        if clear:  # an edge has the shape's whole colour, and is half transparent
            image[coverage[..., 0] > 0, :3] = COLOURS[item.colour]
            image[..., 3:] += coverage * (255 - image[..., 3:])
        else:
            image += coverage * (np.asarray((*COLOURS[item.colour], 255), np.float32) - image)
    return image.round().astype(np.uint8)


def paint_edit(edit: Edit, seed: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the image shown and the one wanted, (SIDE_PX, SIDE_PX, 4) uint8: what is kept stays in place."""
    source, target = (paint(scene, random.Random(seed)) for scene in (edit.sources[0], edit.target))
    return source, target


def lay_down(image: np.ndarray) -> np.ndarray:
    """(H, W, 4) to (H, W, 3) uint8: the image on SEEN_THROUGH."""
    opaque = image[..., 3:].astype(np.float32) / 255
    return np.asarray(image[..., :3] * opaque + np.asarray(SEEN_THROUGH) * (1 - opaque)).round().astype(np.uint8)


def score_rgba(image: np.ndarray, scene: Scene) -> Verdict:
    """The scorer's verdict; a background counts as transparent, and all else as opaque, where that is nearest."""
    return score(lay_down(image), scene, SEEN)


def score_rgba_edit(image: np.ndarray, target: Scene, shown: np.ndarray) -> Verdict:
    return score_edit(lay_down(image), target, lay_down(shown), SEEN)


def asked_captions(count: int) -> list[tuple[str, str, Scene]]:
    """(language, caption, facts): of held-out combinations, and a quarter more about transparent backgrounds. No scene
    twice but for those on nothing; there are about a hundred."""
    rng = random.Random("transparent captions")
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scenes[_draw(rng, held_out=True)] = None
    clear = [replace(_draw(rng, held_out=False), background=TRANSPARENT) for _ in range(count // 4)]
    asked = enumerate([*scenes, *clear])
    return [(language := LANGUAGES[i % len(LANGUAGES)], wording(scene, language, rng), scene) for i, scene in asked]


def asked_edits(count: int) -> list[tuple[str, str, Edit]]:
    """(language, instruction, edit): of one image, to held-out combinations, and a quarter more that remove the
    background."""
    rng = random.Random("transparent edits")
    edits = [_draw_edit(rng, KINDS[i % len(KINDS)], held_out=True) for i in range(count)]
    edits += [_clear(_draw_edit(rng, "background", held_out=False)) for _ in range(count // 4)]
    languages = [LANGUAGES[i // 2 % len(LANGUAGES)] for i in range(len(edits))]
    return [(language, word(order_of(e, rng), language, rng), e) for language, e in zip(languages, edits, strict=True)]
