"""Own the edits: what each makes of the scenes it is shown, its instructions, and which are never trained on."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np

from .data import CHINESE, COLOURS, LANGUAGES, SHAPES, Scene, draw_scene, is_held_out, paint

KINDS = ("shape", "background", "together")  # a shape's colour, the background's, one image's shape on another's
CAPITAL = 0.3  # of the English instructions begin with one

ENGLISH_COLOURINGS = (
    "make {what} {colour}",
    "turn {what} {colour}",
    "change {what} to {colour}",
    "change the colour of {what} to {colour}",
    "change the color of {what} to {colour}",
)
CHINESE_COLOURINGS = (
    "把{what}变成{colour}",
    "把{what}改成{colour}",
    "把{what}的颜色改成{colour}",
    "把{what}换成{colour}",
)
ENGLISH_TOGETHER = (
    "put the {what} of picture {kept} on the background of picture {other}",
    "put the {what} of Picture {kept} on the background of Picture {other}",
)
CHINESE_TOGETHER = ("把图{kept}的{what}放到图{other}的背景上", "把图片{kept}的{what}放到图片{other}的背景上")


@dataclass(frozen=True)
class Order:
    """What an instruction says: `shape` and `colour` name what is meant (None: not said), `wanted` is its new colour;
    `kept`, from 0, is the image whose shape is put on the other's background."""

    kind: str
    shape: str | None = None
    colour: str | None = None
    wanted: str | None = None
    kept: int | None = None


@dataclass(frozen=True)
class Edit:
    """Scenes of the images shown, and the scene wanted. Its shapes stay where those of the source `kept` are."""

    kind: str
    sources: tuple[Scene, ...]
    target: Scene
    kept: int = 0
    item: int | None = None  # which is given another colour

    @property
    def back(self) -> Edit:
        """The edit of one image that undoes this one."""
        return replace(self, sources=(self.target,), target=self.sources[0])

    @property
    def turned(self) -> Edit:
        """The edit of two images that shows them in the other order."""
        return replace(self, sources=self.sources[::-1], kept=1 - self.kept)


def draw_edit(rng: random.Random, kind: str, *, held_out: bool) -> Edit:
    """Return a random edit: to a scene with a held-out combination in it, or with none in any of its scenes."""
    draw = {"shape": _recolour, "background": _change_background, "together": _put_together}[kind]
    while True:
        edit = draw(rng, held_out)
        if any(is_held_out(item, edit.target.background) for item in edit.target.items) == held_out:
            return edit


def _source(rng: random.Random, held_out: bool) -> Scene:
    return draw_scene(rng, held_out=held_out and rng.random() < 0.5)


def _unused(rng: random.Random, scene: Scene) -> str:
    return rng.choice([c for c in COLOURS if c != scene.background and all(c != item.colour for item in scene.items)])


def _recolour(rng: random.Random, held_out: bool) -> Edit:
    source = _source(rng, held_out)
    index = rng.randrange(len(source.items))
    items = list(source.items)
    items[index] = replace(items[index], colour=_unused(rng, source))
    return Edit("shape", (source,), replace(source, items=tuple(items)), item=index)


def _change_background(rng: random.Random, held_out: bool) -> Edit:
    source = _source(rng, held_out)
    return Edit("background", (source,), replace(source, background=_unused(rng, source)))


def _put_together(rng: random.Random, held_out: bool) -> Edit:
    while True:
        shown, other = _source(rng, held_out), _source(rng, held_out)
        taken = {shown.background, *(item.colour for item in shown.items)}
        if len(shown.items) == 1 and other.background not in taken:
            break
    kept = rng.randrange(2)
    target = replace(shown, background=other.background)
    return Edit("together", (other, shown) if kept else (shown, other), target, kept)


def order_of(edit: Edit, rng: random.Random) -> Order:
    """Return what an instruction for the edit says; of two shapes that are alike it says the colour."""
    if edit.kind == "background":
        return Order("background", wanted=edit.target.background)
    if edit.kind == "together":
        shape = edit.target.items[0].shape if rng.random() < 0.3 else None
        return Order("together", shape=shape, kept=edit.kept)
    assert edit.item is not None  # of a kind that names a shape
    items, item = edit.sources[0].items, edit.sources[0].items[edit.item]
    alike = sum(other.shape == item.shape for other in items) > 1
    colour = item.colour if alike or rng.random() < 0.3 else None
    return Order("shape", item.shape, colour, edit.target.items[edit.item].colour)


def instruction(order: Order, language: str, rng: random.Random) -> str:
    """Return one wording of the order, `en` or `zh`."""
    if language == "zh":
        what = "".join(CHINESE[word] for word in (order.colour, order.shape) if word)
        if order.kind == "together":
            return rng.choice(CHINESE_TOGETHER).format(what=what or "图形", **_numbers(order))
        assert order.wanted is not None  # of an order to colour something
        return rng.choice(CHINESE_COLOURINGS).format(what=what or "背景", colour=CHINESE[order.wanted])
    what = " ".join(filter(None, (order.colour, order.shape)))
    if order.kind == "together":
        text = rng.choice(ENGLISH_TOGETHER).format(what=what or "shape", **_numbers(order))
    else:
        text = rng.choice(ENGLISH_COLOURINGS).format(what=f"the {what or 'background'}", colour=order.wanted)
    return text[0].upper() + text[1:] if rng.random() < CAPITAL else text


def _numbers(order: Order) -> dict[str, int]:
    assert order.kept is not None  # of an order to put two together
    return {"kept": order.kept + 1, "other": 2 - order.kept}


def held_out_edits(count: int, *, seed: int = 0) -> list[tuple[str, str, Edit]]:
    """Return (language, instruction, edit), kinds and languages in turn, each to a scene with a held-out combination;
    no edit twice."""
    rng = random.Random(f"held-out edits {seed}")
    found: dict[Edit, tuple[str, str, Edit]] = {}
    while len(found) < count:
        number = len(found)
        edit = draw_edit(rng, KINDS[number % len(KINDS)], held_out=True)
        if edit not in found:
            language = LANGUAGES[number // len(KINDS) % len(LANGUAGES)]
            found[edit] = (language, instruction(order_of(edit, rng), language, rng), edit)
    return list(found.values())


def paint_edit(edit: Edit, seed: str, *, side_px: int = 128) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the images shown and the one wanted, (side_px, side_px, 3) uint8: what is kept stays in place."""
    sources = [paint(scene, random.Random(f"{seed} {i}"), side_px=side_px) for i, scene in enumerate(edit.sources)]
    return sources, paint(edit.target, random.Random(f"{seed} {edit.kept}"), side_px=side_px)


def every_order() -> list[Order]:
    """Return all that instructions can say."""
    colours = tuple(COLOURS)
    orders = [Order("background", wanted=wanted) for wanted in colours]
    orders += [Order("together", shape=shape, kept=kept) for shape in (None, *SHAPES) for kept in (0, 1)]
    return orders + [
        Order("shape", shape, colour, wanted)
        for shape in SHAPES
        for colour in (None, *colours)
        for wanted in colours
        if colour != wanted
    ]
