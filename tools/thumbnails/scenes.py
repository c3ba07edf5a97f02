"""What each kind of workflow is asked to show, and how a run of it is told right from wrong. Random, from a name."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from miniature.data import COLOURS, Item, Scene, caption, draw_scene, is_held_out, paint
from miniature.edits import draw_edit, instruction, order_of, paint_edit
from miniature.rgba import TRANSPARENT, draw_rgba_edit, score_rgba, score_rgba_edit, word
from miniature.rgba import draw as draw_rgba
from miniature.rgba import paint_edit as paint_rgba_edit
from miniature.scorer import score, score_edit
from PIL import Image

SIDE_PX = 128
HALF = SIDE_PX // 2
Right = Callable[[np.ndarray], bool]


@dataclass(frozen=True)
class Task:
    """words: the prompt; given: images that are shown; masked: as they lie in the input folder, if with a mask."""

    words: str
    right: Right
    given: list[np.ndarray] = field(default_factory=list)
    files: list[np.ndarray] = field(default_factory=list)


def from_text(chance: random.Random) -> Task:
    scene = draw_scene(chance, held_out=False)
    return Task(caption(scene, "en", chance), lambda image: score(image, scene).correct)


def edit(chance: random.Random, *, several: bool) -> Task:
    made = draw_edit(chance, "together" if several else chance.choice(("shape", "background")), held_out=False)
    words = instruction(order_of(made, chance), "en", chance)
    shown, _ = paint_edit(made, words)
    return Task(words, lambda image: score_edit(image, made.target, shown[made.kept]).correct, shown, shown)


def from_text_21(chance: random.Random, *, clear: bool) -> Task:
    """`clear`: on a transparent background."""
    while ((scene := draw_rgba(chance)).background == TRANSPARENT) != clear:
        pass
    return Task(caption(scene, "en", chance), lambda image: score_rgba(image, scene).correct)


def edit_21(chance: random.Random, *, clear: bool) -> Task:
    """`clear`: the background is removed."""
    while True:
        made = draw_rgba_edit(chance)
        before, after = made.sources[0].background, made.target.background
        if before != TRANSPARENT and (after == TRANSPARENT) == clear:
            break
    words = word(order_of(made, chance), "en", chance)
    shown, _ = paint_rgba_edit(made, words)
    return Task(words, lambda image: score_rgba_edit(image, made.target, shown).correct, [shown[..., :3]], [shown])


def image_to_image(chance: random.Random) -> Task:
    before, after = chance.sample(("red", "orange", "green", "blue", "purple"), 2)
    place, size = chance.choice(("left", "right", "top", "bottom")), chance.choice(("large", "small"))
    ground = "white"
    shown = paint(Scene(ground, (Item("circle", before, size),), place), chance)
    scene = Scene(ground, (Item("circle", after, None),), place)
    return Task(caption(scene, "en", chance), lambda image: score(image, scene).correct, [shown], [shown])


def _pair(chance: random.Random) -> tuple[Scene, Scene]:
    """A shape in the left half, and the same with another to the right of it."""
    while True:
        ground = chance.choice(("white", "yellow", "black"))
        first, second = chance.sample(("red", "orange", "green", "blue", "purple"), 2)
        items = (Item(chance.choice(("circle", "square")), first, "large"), Item("circle", second, "large"))
        if not any(is_held_out(item, ground) for item in items):
            return Scene(ground, items[:1], "left"), Scene(ground, items, "left")


def inpaint(chance: random.Random) -> Task:
    one, both = _pair(chance)
    shown = paint(one, chance)
    alpha = np.full((SIDE_PX, SIDE_PX, 1), 255, dtype=np.uint8)
    alpha[:, HALF + 4 :] = 0
    file = np.concatenate([shown, alpha], axis=2)
    return Task(caption(both, "en", chance), lambda image: score(image, both).correct, [shown], [file])


def outpaint(chance: random.Random) -> Task:
    one, both = _pair(chance)
    shown = paint(one, chance)[:, :HALF]
    return Task(caption(both, "en", chance), lambda image: score(image, both).correct, [shown], [shown])


def drawn_layers(chance: random.Random) -> tuple[Image.Image, list[Image.Image]]:
    """An image and its layers, painted: no miniature takes images apart."""
    items = (Item("circle", "red", "large"), Item("square", "blue", "large"))
    whole = paint(Scene("yellow", items, "above"), chance, side_px=256)
    layers = [Image.new("RGBA", (256, 256), COLOURS["yellow"])]
    for colour in (COLOURS["red"], COLOURS["blue"]):
        near = np.abs(whole.astype(int) - colour).sum(2)
        alpha = np.clip(255 - 3 * near, 0, 255).astype(np.uint8)
        layers.append(Image.fromarray(np.dstack([np.broadcast_to(np.array(colour, np.uint8), whole.shape), alpha])))
    return Image.fromarray(whole), layers


def asked(task: Task) -> dict[str, Any]:
    return {"positive": task.words, "negative": " "}
