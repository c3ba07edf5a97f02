"""The training of 2.1's miniature: its parts learn, see what diffusers' pipeline makes of a text, and write a folder
that this engine draws from. Collected where diffusers has 2.1."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from miniature.copies_21 import predict
from miniature.evaluate_21 import LEAST_PX, make
from miniature.flow_21 import build_transformer, flow_errors
from miniature.rgba import SIDE_PX, asked_captions, asked_edits, draw, paint, paint_edit
from miniature.run import TimedRun
from miniature.text_21 import Embeddings
from miniature.vae_21 import build_vae, decode, encode, to_tensor, whiten
from PIL import Image
from qwenimage_lowvram.engine.runs.pipeline import Pipeline
from small_pipeline_21 import open_with_diffusers
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
LIMIT_BYTES = 15_000_000
SECONDS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for seconds: it draws nothing yet."""
    out = tmp_path_factory.mktemp("miniature") / "miniature-2.1"
    script = REPOSITORY / "tools" / "miniature" / "train_21.py"
    subprocess.run([sys.executable, script, "--minutes", str(SECONDS / 60), "--out", out, "--pool", "24"], check=True)
    return out


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return open_with_diffusers(folder, least_px=LEAST_PX).to(torch.float32)


def test_the_folder_keeps_the_limit(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < LIMIT_BYTES


def test_the_checkpoints_of_every_stage_hold_its_steps(folder: Path) -> None:
    stages = {name: torch.load(folder.with_suffix(".work") / f"{name}.pt") for name in ("vae", "text", "transformer")}
    assert all(stage["step"] > 0 and stage["used_seconds"] > 0 for stage in stages.values())


@pytest.mark.parametrize("shown", [False, True], ids=["caption", "instruction"])
def test_training_sees_the_embeddings_that_the_pipeline_makes(folder: Path, pipeline: Any, shown: bool) -> None:
    _, text, case = (asked_edits if shown else asked_captions)(1)[0]
    image = [Image.fromarray(paint_edit(case, "0")[0])] if shown else None
    wanted, _, slots = pipeline._get_qwen_prompt_embeds([text], image)
    tokenizer = AutoTokenizer.from_pretrained(folder / "processor")
    embeds, mask, places = Embeddings(pipeline.text_encoder, tokenizer)([text], shown=shown)
    assert bool(mask.all())
    assert places.tolist() == slots[0].tolist()
    # the state at an image's slots is never seen: its latents stand there
    assert (embeds - wanted)[:, ~places].abs().max() < 1e-4 * wanted.abs().max()


def test_the_latents_are_those_of_the_pipeline(pipeline: Any) -> None:
    image = paint(asked_captions(1)[0][2], random.Random(0))
    wanted = pipeline._encode_vae_image(to_tensor(image[None]), None).flatten(2).transpose(1, 2)
    latents = encode(pipeline.vae, image[None])
    assert (latents - wanted).abs().max() < 0.05 * wanted.abs().max()  # training encodes in bf16
    assert decode(pipeline.vae, latents).shape == (1, SIDE_PX, SIDE_PX, 4)


def test_an_untrained_vae_begins_with_latents_that_differ_as_much_as_they_shall() -> None:
    torch.manual_seed(0)
    vae, rng = build_vae(), random.Random(0)
    images = np.stack([paint(draw(rng), rng) for _ in range(64)])
    before = encode(vae, images).flatten(0, 1)
    whiten(vae, to_tensor(images))
    latents = encode(vae, images).flatten(0, 1)
    assert before.std(0).max() < 0.2
    assert latents.mean(0).abs().max() < 0.1
    assert (latents.std(0) > 0.3).float().mean() > 0.5
    assert latents.std(0).max() < 1.1


def test_the_engine_draws_what_the_pipeline_draws(folder: Path, pipeline: Any) -> None:
    text = asked_captions(1)[0][1]
    noise = torch.randn((1, 64, 4, 4), generator=torch.Generator().manual_seed(5)).flatten(2).transpose(1, 2)
    wanted = pipeline(
        text, num_inference_steps=3, width=SIDE_PX, height=SIDE_PX, latents=noise, output_type="pt"
    ).images.permute(0, 2, 3, 1)
    with Pipeline.open(folder, device="cpu", dtype=torch.float32) as ours:
        made = ours.make(text, width=SIDE_PX, height=SIDE_PX, seed=5, steps=3, cfg=1.0)
    assert (made - wanted).abs().max() < 1e-3


def test_it_is_asked_for_an_edit(pipeline: Any) -> None:
    _, text, edit = asked_edits(1)[0]
    made = make(pipeline, text, paint_edit(edit, "0")[0], seed=0, steps=2, cfg=4.0)
    assert made.shape == (SIDE_PX, SIDE_PX, 4)


def test_the_score_is_told_of_captions_edits_and_transparent_backgrounds(folder: Path, tmp_path: Path) -> None:
    script, sheet = REPOSITORY / "tools" / "miniature" / "evaluate_21.py", tmp_path / "sheet.png"
    command = [sys.executable, script, folder, "--count", "16", "--steps", "1", "--cfg", "1", "--sheet", sheet]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    groups = {" ".join(line.split(" {")[0].split()) for line in told.splitlines() if " {" in line}
    assert {"draw held out", "draw transparent", "edit held out", "edit transparent"} <= groups
    assert Image.open(sheet).width == 16 * SIDE_PX


@pytest.mark.parametrize("shown", [False, True], ids=["drawing", "editing"])
def test_images_that_share_a_prefix_are_predicted_as_the_model_itself_predicts_each(shown: bool) -> None:
    torch.manual_seed(0)
    model = build_transformer()
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    batch, copies, tokens = 3, 2, 16
    noisy, sigmas = torch.randn(batch, copies, tokens, 64), torch.rand(batch)
    latents, embeds = torch.randn(batch, tokens if shown else 0, 64), torch.randn(batch, 14, 128)
    mask, slots = torch.ones(batch, 14, dtype=torch.bool), torch.zeros(14, dtype=torch.bool)
    mask[1, -3:], slots[2:6] = False, shown
    with torch.no_grad():
        each = [
            model(
                hidden_states=torch.cat([latents, noisy[:, i]], dim=1),
                encoder_hidden_states=embeds,
                timestep=sigmas,
                img_shapes=[[(1, 4, 4)] * (2 if shown else 1)] * batch,
                img_mask=torch.cat([slots, torch.ones(4, dtype=torch.bool)]).expand(batch, -1),
                encoder_hidden_states_mask=mask,
                return_dict=False,
            )[0][:, -tokens:]
            for i in range(copies)
        ]
        made = predict(model, noisy, sigmas, shown=latents, embeds=embeds, mask=mask, slots=slots)
    assert made.std() > 0.1
    assert (made - torch.stack(each, dim=1)).abs().max() < 1e-5


def test_steps_of_training_lower_the_error_of_a_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_transformer()
    latents, embeds = torch.randn(8, 2, 16, 64), torch.randn(8, 12, 128)
    mask, slots = torch.ones(8, 12, dtype=torch.bool), torch.arange(12).sub(3).div(4, rounding_mode="floor") == 0
    errors = []
    run = TimedRun(model, tmp_path / "run.pt", seconds=1e9, lr=1.5e-3, warmup_steps=5)
    for _ in zip(range(12), run.steps(), strict=False):
        torch.manual_seed(1)
        loss = flow_errors(model, latents, embeds, mask, slots).mean()
        errors.append(loss.item())
        run.update(loss)
    assert errors[-1] < 0.95 * errors[0]
