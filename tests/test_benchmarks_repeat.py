"""What `python dev.py bench repeat` shows: an image after the first reads only what changed, and is ComfyUI's."""

from typing import Any

import pytest
import torch
from devtools import bench

LAYERS, STEPS = 6, 4


@pytest.fixture(scope="module")
def repeat(comfyui_path: Any) -> Any:
    return bench.load(bench.BENCHMARKS / "repeat.py")


@pytest.fixture(scope="module")
def rows(repeat: Any) -> dict[str, list[dict[str, Any]]]:
    """By who, of a first image with a LoRA, another seed, and another strength of the LoRA."""
    made = repeat.rows(True)
    return {who: [row for row in made if row["who"] == who] for who in ("ours", "comfyui")}


def test_the_first_image_reads_the_encoder_the_modulation_and_all_blocks(rows: Any) -> None:
    first = rows["ours"][0]
    assert first["encoder_bytes"] > 0
    assert first["modulation_bytes"] == rows["comfyui"][0]["modulation_bytes"] > 0
    assert 0 < first["resident_blocks"] < LAYERS
    assert first["fetched_blocks"] == first["resident_blocks"] + STEPS * (LAYERS - first["resident_blocks"])


def test_another_seed_reads_only_the_blocks_that_do_not_stay(rows: Any) -> None:
    seed = rows["ours"][1]
    assert (seed["encoder_bytes"], seed["modulation_bytes"]) == (0, 0)
    assert seed["fetched_blocks"] == STEPS * (LAYERS - seed["resident_blocks"])


def test_another_strength_reads_beside_those_only_the_blocks_that_it_changes(rows: Any) -> None:
    _, seed, strength = rows["ours"]
    assert (strength["encoder_bytes"], strength["modulation_bytes"]) == (0, 0)
    assert 0 < strength["fetched_blocks"] - seed["fetched_blocks"] < seed["resident_blocks"]


def test_comfyui_reads_everything_once_and_keeps_it(rows: Any) -> None:
    for row, ours in zip(rows["comfyui"], rows["ours"], strict=True):
        assert row["held_bytes"] > 5 * ours["held_bytes"]
    assert [row["block_bytes"] > 0 for row in rows["comfyui"]] == [True, False, False]


def test_both_read_the_tokenizer_from_the_same_files(rows: Any) -> None:
    assert {row["tokenizer"] for row in (*rows["ours"], *rows["comfyui"])} == {"qwen25_tokenizer"}


def test_the_first_step_comes_before_the_last(rows: Any) -> None:
    for row in (*rows["ours"], *rows["comfyui"]):
        assert 0 < row["first_step_seconds"] < row["seconds"]
        assert row["peak_bytes"] > 0


def test_images_that_are_not_the_same_give_no_figures(repeat: Any) -> None:
    image = torch.linspace(-1, 1, 64)
    near, far = image.clone(), image.clone()
    near[3] += 0.9e-4
    far[3] += 1.1e-4
    assert repeat.compare([image, near], [image, image]) == pytest.approx([0.0, 0.9e-4], rel=0.01)
    for other in (far, torch.full_like(image, torch.nan)):
        with pytest.raises(SystemExit, match="Picture 2 is not ComfyUI's"):
            repeat.compare([image, other], [image, image])
