"""The world of 2.1's miniature: what is see-through is seen as such, and the test is not what is trained on."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from miniature.data import COLOURS, Item, Scene, is_held_out
from miniature.rgba import (
    ENGLISH_REMOVALS,
    SIDE_PX,
    TRANSPARENT,
    asked_captions,
    asked_edits,
    draw,
    draw_rgba_edit,
    paint,
    paint_edit,
    score_rgba,
    score_rgba_edit,
)

CLEAR = Scene(TRANSPARENT, (Item("circle", "red", "large"),), "left")


def wrong_facts(shown: Scene, asked: Scene) -> set[str]:
    return {fact for fact, right in score_rgba(paint(shown, random.Random(0)), asked).facts.items() if not right}


def test_every_painted_scene_scores_as_correct() -> None:
    rng = random.Random(3)
    scenes = [draw(rng) for _ in range(150)]
    assert {TRANSPARENT, *COLOURS} == {scene.background for scene in scenes}
    assert [scene for scene in scenes if not score_rgba(paint(scene, rng), scene).correct] == []


def test_every_painted_edit_scores_as_correct_and_its_source_does_not() -> None:
    rng = random.Random(3)
    edits = [draw_rgba_edit(rng) for _ in range(80)]
    assert {edit.kind for edit in edits if edit.target.background == TRANSPARENT} == {"shape", "background"}
    for i, edit in enumerate(edits):
        shown, wanted = paint_edit(edit, str(i))
        assert score_rgba_edit(wanted, edit.target, shown).correct
        assert not score_rgba_edit(shown, edit.target, shown).correct


@pytest.mark.parametrize("background", COLOURS)
def test_no_colour_passes_for_a_transparent_background(background: str) -> None:
    other = replace(CLEAR, background=background, items=(Item("circle", "black", "large"),))
    if background == "black":
        other = replace(other, items=(Item("circle", "white", "large"),))
    assert "background" in wrong_facts(other, replace(other, background=TRANSPARENT))
    assert "background" in wrong_facts(replace(other, background=TRANSPARENT), other)


def test_a_shape_that_is_see_through_itself_is_wrong() -> None:
    image = paint(replace(CLEAR, background="white"), random.Random(0))
    hole = paint(CLEAR, random.Random(0))[..., 3]
    image[..., 3] = 255 - hole
    assert not score_rgba(image, replace(CLEAR, background="white")).correct


def test_what_lies_under_a_transparent_pixel_is_not_seen() -> None:
    image = paint(CLEAR, random.Random(0))
    image[image[..., 3] == 0] = np.random.default_rng(0).integers(0, 255, 4, dtype=np.uint8) * (1, 1, 1, 0)
    assert score_rgba(image, CLEAR).correct


def test_captions_and_edits_that_are_asked() -> None:
    captions, edits = asked_captions(40), asked_edits(40)
    assert [scene.background for _, _, scene in captions[40:]] == [TRANSPARENT] * 10
    assert all(any(is_held_out(item, s.background) for item in s.items) for _, _, s in captions[:40])
    assert [edit.target.background for _, _, edit in edits[40:]] == [TRANSPARENT] * 10
    assert all(any(is_held_out(i, e.target.background) for i in e.target.items) for _, _, e in edits[:40])
    assert {text for language, text, _ in edits[40:] if language == "en"} <= set(ENGLISH_REMOVALS)
    assert paint(captions[0][2], random.Random(0)).shape == (SIDE_PX, SIDE_PX, 4)


def test_every_image_shows_one_large_shape() -> None:
    rng = random.Random(0)
    scenes = [scene for _, _, scene in asked_captions(40)] + [edit.target for _, _, edit in asked_edits(40)]
    scenes += [draw(rng) for _ in range(50)] + [draw_rgba_edit(rng).target for _ in range(50)]
    assert {tuple(item.size for item in scene.items) for scene in scenes} == {("large",)}


def test_training_never_shows_a_held_out_combination() -> None:
    rng = random.Random(0)
    edits = [draw_rgba_edit(rng) for _ in range(500)]
    scenes = [draw(rng) for _ in range(500)] + [s for edit in edits for s in (edit.target, *edit.sources)]
    assert not any(is_held_out(item, scene.background) for scene in scenes for item in scene.items)
