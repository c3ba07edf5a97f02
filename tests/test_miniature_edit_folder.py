"""The editing miniature's folder: what kind of pipeline it is, how it reads instructions, and that it edits."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from miniature.data import LANGUAGES
from miniature.edits import every_order, held_out_edits, instruction, paint_edit
from miniature.scorer import score_edit

FOLDER = Path(__file__).parents[1] / "miniature-edit"
LIMIT_BYTES = 16_000_000


@pytest.fixture(scope="module")
def pipeline():
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from edit_reference import open_edit_folder

    return open_edit_folder(FOLDER, 128 * 128)


def test_the_committed_folder_is_small_and_stored_in_bf16() -> None:
    safetensors = pytest.importorskip("safetensors")
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= LIMIT_BYTES
    for name in ("transformer/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        with safetensors.safe_open(FOLDER / f"{name}.safetensors", framework="pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_the_committed_folder_is_an_edit_2509() -> None:
    diffusers = pytest.importorskip("diffusers")
    from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
    from qwenimage_lowvram.engine.models.qwen_image.variants import Variant, variant_of

    assert variant_of(open_checkpoint(FOLDER / "transformer")) is Variant.EDIT_2509
    assert type(diffusers.DiffusionPipeline.from_pretrained(FOLDER)) is diffusers.QwenImageEditPlusPipeline


def test_the_template_prefix_is_as_long_as_the_pipeline_drops(pipeline) -> None:
    template, dropped = pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx
    assert dropped == 64
    assert len(pipeline.tokenizer(template.split("{}")[0]).input_ids) == dropped


def test_every_instruction_is_tokenised_as_by_the_whole_tokenizer(pipeline, comfyui_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    whole = Qwen2Tokenizer.from_pretrained(comfyui_path / "comfy" / "text_encoders" / "qwen25_tokenizer")
    rng = random.Random(1)
    for text in {instruction(order, language, rng) for order in every_order() * 5 for language in LANGUAGES}:
        shown = f"Picture 1: <|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>"
        known, all_known = (t.convert_ids_to_tokens(t(shown).input_ids) for t in (pipeline.tokenizer, whole))
        assert known == all_known


@pytest.mark.parametrize("shown", [1, 2])
def test_training_reads_instructions_as_the_pipeline_does(pipeline, shown: int) -> None:
    import torch
    from miniature.edit_text import Embeddings
    from PIL import Image

    text = "make the circle blue"
    images = [Image.effect_noise((384, 384), 90).convert("RGB") for _ in range(shown)]
    read = Embeddings(pipeline.text_encoder, pipeline.tokenizer)
    with torch.no_grad():
        wanted, _ = pipeline._get_qwen_prompt_embeds(text, images)
    ours, mask, places, _ = read([text], shown, thinned=False)
    assert (ours - wanted).abs().max() < 1e-4  # whatever the images show: the vision tower says nothing
    few, _, kept, amounts = read([text], shown, thinned=True)
    assert torch.equal(few, ours[:, kept])
    assert mask.all()
    assert len(kept) < len(places) == round(float(amounts.exp().sum()))  # those kept count for all


def test_the_committed_folder_does_most_of_six_held_out_edits(pipeline) -> None:
    from miniature.evaluate import edit_images

    right = 0
    for i, (_, text, edit) in enumerate(held_out_edits(6)):
        shown, _ = paint_edit(edit, f"held out {i}")
        made = edit_images(pipeline, text, shown, seed=i)
        right += score_edit(made, edit.target, shown[edit.kept]).correct
    assert right >= 5
