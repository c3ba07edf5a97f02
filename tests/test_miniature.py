"""The miniature: the scorer sees what is drawn and what is wrong, test and training do not mix, the folder draws."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from miniature.data import (
    COLOURS,
    LANGUAGES,
    RELATIONS,
    SHAPES,
    Item,
    Scene,
    caption,
    draw_scene,
    forget_some_facts,
    held_out_captions,
    is_held_out,
    paint,
)
from miniature.scorer import describe, score

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "miniature"
LIMIT_BYTES = 16_000_000
ONE = Scene("white", (Item("circle", "red", "large"),), "centre")
TWO = Scene("blue", (Item("square", "yellow", "small"), Item("triangle", "red", "large")), "left")


def image_of(scene: Scene, seed: int = 0) -> np.ndarray:
    return paint(scene, random.Random(seed))


def wrong_facts(image: np.ndarray, scene: Scene) -> set[str]:
    return {fact for fact, right in score(image, scene).facts.items() if not right}


@pytest.mark.parametrize("held_out", [False, True])
def test_every_painted_scene_scores_as_correct(held_out: bool) -> None:
    rng = random.Random(3)
    scenes = [draw_scene(rng, held_out=held_out) for _ in range(150)]
    assert [s for s in scenes if not score(paint(s, rng), s).correct] == []


@pytest.mark.parametrize(
    ("shown", "fact"),
    [
        (replace(ONE, background="yellow"), "background"),
        (replace(ONE, items=(Item("circle", "orange", "large"),)), "colour"),
        (replace(ONE, items=(Item("square", "red", "large"),)), "shape"),
        (replace(ONE, items=(Item("triangle", "red", "large"),)), "shape"),
        (replace(ONE, items=(Item("circle", "red", "small"),)), "size"),
        (replace(ONE, place="left"), "place"),
        (replace(ONE, place="bottom"), "place"),
    ],
)
def test_a_wrong_fact_is_found_and_only_it(shown: Scene, fact: str) -> None:
    assert wrong_facts(image_of(shown), ONE) == {fact}


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("shown", RELATIONS)
def test_only_the_stated_relation_is_right(relation: str, shown: str) -> None:
    expected = set() if relation == shown else {"place"}
    assert wrong_facts(image_of(replace(TWO, place=shown)), replace(TWO, place=relation)) == expected


def test_swapped_colours_are_wrong() -> None:
    square, triangle = TWO.items
    swapped = (replace(square, colour="red"), replace(triangle, colour="yellow"))
    assert not score(image_of(replace(TWO, items=swapped)), TWO).correct


def test_swapped_sizes_are_wrong() -> None:
    square, triangle = TWO.items
    swapped = (replace(square, size="large"), replace(triangle, size="small"))
    assert wrong_facts(image_of(replace(TWO, items=swapped)), TWO) == {"size"}


@pytest.mark.parametrize(("shown", "stated"), [(ONE, TWO), (TWO, ONE)])
def test_a_missing_or_additional_shape_makes_every_fact_about_shapes_wrong(shown: Scene, stated: Scene) -> None:
    assert {"count", "shape", "colour", "size", "place"} <= wrong_facts(image_of(shown), stated)


@pytest.mark.parametrize("value", [0, 127, 255])
def test_an_empty_image_is_wrong(value: int) -> None:
    assert not score(np.full((128, 128, 3), value, np.uint8), ONE).correct


def test_noise_is_wrong() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert not score(noise, ONE).correct


def test_a_shape_that_is_none_of_the_known_is_wrong() -> None:
    image = image_of(ONE)
    image[64:] = image[0, 0]  # half a circle
    assert "shape" in wrong_facts(image, ONE)


def test_faint_noise_and_blur_do_not_change_the_verdict() -> None:
    noise = np.random.default_rng(0).normal(0, 6, (128, 128, 3))
    image = image_of(TWO).astype(float)
    image[1:-1] = (image[:-2] + image[1:-1] + image[2:]) / 3
    assert score(np.clip(image + noise, 0, 255).astype(np.uint8), TWO).correct


def test_facts_that_the_caption_leaves_open_are_not_asked() -> None:
    asked = Scene("white", (Item("circle", "red", None),), None)
    assert score(image_of(replace(ONE, place="top")), asked).correct
    assert score(image_of(replace(ONE, items=(Item("circle", "red", "small"),))), asked).correct


def test_a_larger_image_is_described_alike() -> None:
    large = paint(TWO, random.Random(5), side_px=256)
    assert score(large, TWO).correct
    assert describe(large)[0] == "blue"


def test_training_never_shows_a_held_out_combination() -> None:
    rng = random.Random(0)
    scenes = [draw_scene(rng, held_out=False) for _ in range(3000)]
    assert not any(is_held_out(item, scene.background) for scene in scenes for item in scene.items)


def test_every_test_caption_has_a_held_out_combination_and_all_facts() -> None:
    cases = held_out_captions(200)
    assert len({scene for _, _, scene in cases}) == 200
    assert {language for language, _, _ in cases} == set(LANGUAGES)
    for _, _, scene in cases:
        assert any(is_held_out(item, scene.background) for item in scene.items)
        assert scene.place
        assert all(item.size for item in scene.items)


def test_every_colour_shape_and_background_is_trained_on() -> None:
    rng = random.Random(0)
    scenes = [draw_scene(rng, held_out=False) for _ in range(2000)]
    seen = {(item.shape, item.colour) for scene in scenes for item in scene.items}
    assert seen == {(shape, colour) for shape in SHAPES for colour in COLOURS}
    assert {scene.background for scene in scenes} == set(COLOURS)


def test_captions_read_as_documented() -> None:
    short = forget_some_facts(ONE, random.Random(0), probability=1)
    assert short == Scene("white", (Item("circle", "red", None),), None)
    assert caption(short, "zh", random.Random(0)) == "白色背景上的红色圆形"
    wordings = {caption(TWO, "en", random.Random(seed)) for seed in range(50)}
    assert "a small yellow square left of a large red triangle on a blue background" in wordings


def test_the_committed_folder_is_small_and_stored_in_bf16() -> None:
    safetensors = pytest.importorskip("safetensors")
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= LIMIT_BYTES
    for name in ("transformer/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        with safetensors.safe_open(FOLDER / f"{name}.safetensors", framework="pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118


@pytest.fixture(scope="module")
def pipeline():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    loaded = diffusers.QwenImagePipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_template_prefix_is_as_long_as_the_pipelines_drop(pipeline) -> None:
    template, dropped = pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx
    assert dropped == 34
    assert len(pipeline.tokenizer(template.split("{}")[0]).input_ids) == dropped


def test_the_committed_folder_draws_most_of_eight_held_out_captions(pipeline) -> None:
    from miniature.evaluate import draw

    cases = held_out_captions(8)
    images = draw(pipeline, [text for _, text, _ in cases], seed=0, batch=8)
    right = [score(image, scene).correct for image, (_, _, scene) in zip(images, cases, strict=True)]
    assert sum(right) >= 6
