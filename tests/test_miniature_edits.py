"""Edits of the miniature: they are what their instructions say, and the scorer sees what should have stayed."""

from __future__ import annotations

import random

import numpy as np
import pytest
from miniature.data import COLOURS, LANGUAGES, Item, Scene, is_held_out, paint
from miniature.edits import (
    KINDS,
    Edit,
    Order,
    draw_edit,
    every_order,
    held_out_edits,
    instruction,
    order_of,
    paint_edit,
)
from miniature.scorer import score, score_edit

CIRCLE = Scene("white", (Item("circle", "red", "large"),), "left")
PAIR = Scene("blue", (Item("square", "yellow", "small"), Item("square", "red", "large")), "left")


def edits(count: int = 60, *, held_out: bool = False, kinds: tuple[str, ...] = KINDS) -> list[Edit]:
    rng = random.Random(7)
    return [draw_edit(rng, kinds[i % len(kinds)], held_out=held_out) for i in range(count)]


def wrong_facts(image: np.ndarray, target: Scene, kept: np.ndarray) -> set[str]:
    return {fact for fact, right in score_edit(image, target, kept).facts.items() if not right}


@pytest.mark.parametrize("held_out", [False, True])
def test_every_wanted_image_scores_as_correct(held_out: bool) -> None:
    for i, edit in enumerate(edits(held_out=held_out)):
        shown, target = paint_edit(edit, str(i))
        assert wrong_facts(target, edit.target, shown[edit.kept]) == set(), edit


def test_an_image_that_is_left_as_it_was_is_wrong() -> None:
    for i, edit in enumerate(edits()):
        shown, _ = paint_edit(edit, str(i))
        assert all(wrong_facts(image, edit.target, shown[edit.kept]) for image in shown), edit


def test_the_wanted_image_differs_only_where_the_edit_says() -> None:
    for i, edit in enumerate(edits(kinds=("shape",))):
        (shown,), target = (np.asarray(images, int) for images in paint_edit(edit, str(i)))
        source = edit.sources[0]
        others = [source.background, *(item.colour for j, item in enumerate(source.items) if j != edit.item)]
        left = np.any([(shown == COLOURS[colour]).all(-1) for colour in others], axis=0)
        assert left.mean() > 0.5
        assert np.abs(shown[left] - target[left]).max() <= 2  # a trace of an edge is rounded
        was = (shown == COLOURS[source.items[edit.item].colour]).all(-1)
        assert was.any()
        new = np.asarray(COLOURS[edit.target.items[edit.item].colour])
        assert np.abs(target[was] - new).max() <= 2


@pytest.mark.parametrize(("shift_px", "wrong"), [(0, set()), (2, set()), (4, {"stayed"})])
def test_a_shape_that_moves_is_found(shift_px: int, wrong: set[str]) -> None:
    kept = paint(PAIR, random.Random(0))
    assert wrong_facts(np.roll(kept, shift_px, axis=1), PAIR, kept) == wrong


def test_a_shape_that_grows_is_found() -> None:
    sizes = [paint(CIRCLE, random.Random(seed)) for seed in range(40)]
    widths = [int((image != image[0, 0]).any((0, 2)).sum()) for image in sizes]
    small, large = sizes[int(np.argmin(widths))], sizes[int(np.argmax(widths))]
    assert max(widths) - min(widths) >= 4
    assert score(large, CIRCLE).correct
    assert "stayed" in wrong_facts(large, CIRCLE, small)


def test_a_lost_shape_did_not_stay() -> None:
    kept = paint(PAIR, random.Random(0))
    lost = kept.copy()
    lost[:, :64] = kept[0, 0]
    assert {"count", "stayed"} <= wrong_facts(lost, PAIR, kept)


def test_training_never_shows_a_held_out_combination() -> None:
    for edit in edits(600):
        other = edit.turned if edit.kind == "together" else edit.back
        for scene in (*edit.sources, edit.target, *other.sources, other.target):
            assert not any(is_held_out(item, scene.background) for item in scene.items)


def test_every_test_edit_makes_a_held_out_combination() -> None:
    cases = held_out_edits(200)
    assert len({edit for _, _, edit in cases}) == 200
    assert {(language, edit.kind) for language, _, edit in cases} == {(a, b) for a in LANGUAGES for b in KINDS}
    for _, _, edit in cases:
        assert any(is_held_out(item, edit.target.background) for item in edit.target.items)


def test_an_instruction_means_one_shape() -> None:
    rng = random.Random(0)
    for edit in edits(400, kinds=("shape",)):
        order = order_of(edit, rng)
        meant = [
            i
            for i, item in enumerate(edit.sources[0].items)
            if item.shape == order.shape and order.colour in (None, item.colour)
        ]
        assert meant == [edit.item]
        assert edit.target.items[edit.item].colour == order.wanted


def test_an_edit_and_its_way_back_are_both_edits() -> None:
    for edit in edits(kinds=("shape", "background")):
        assert edit.back.back == edit
        assert edit.back.target == edit.sources[0]


def test_two_images_in_the_other_order_make_the_same() -> None:
    for edit in edits(kinds=("together",)):
        assert edit.turned.sources[edit.turned.kept] == edit.sources[edit.kept]
        assert edit.turned.target == edit.target
        assert order_of(edit.turned, random.Random(0)).kept != order_of(edit, random.Random(0)).kept


def wordings(order: Order, language: str) -> set[str]:
    return {instruction(order, language, random.Random(seed)) for seed in range(60)}


def test_instructions_read_as_documented() -> None:
    assert "make the circle blue" in wordings(Order("shape", "circle", None, "blue"), "en")
    assert "把红色圆形变成蓝色" in wordings(Order("shape", "circle", "red", "blue"), "zh")
    assert "change the background to yellow" in wordings(Order("background", wanted="yellow"), "en")
    assert "把背景改成黄色" in wordings(Order("background", wanted="yellow"), "zh")
    together = Order("together", kept=0)
    assert "put the shape of picture 1 on the background of picture 2" in wordings(together, "en")
    assert "把图1的图形放到图2的背景上" in wordings(together, "zh")


def test_every_colour_is_asked_for() -> None:
    assert {order.wanted for order in every_order() if order.kind == "shape"} == set(COLOURS)
