"""Score a miniature on held-out captions or edits: diffusers' own pipeline draws, the scorer looks.

python tools/miniature/evaluate.py miniature --count 200
python tools/miniature/evaluate.py miniature-edit --edit --count 200
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from edit_reference import EditPlusPipeline, open_edit_folder

from miniature.data import Scene, held_out_captions
from miniature.edits import Edit, held_out_edits, paint_edit
from miniature.scorer import Verdict, score, score_edit

SIDE_PX, STEPS, CFG = 128, 20, 4.0


def draw(
    pipeline: QwenImagePipeline,
    captions: Sequence[str],
    *,
    seed: int,
    batch: int,
    steps: int = STEPS,
    guidance: float = CFG,
) -> list[np.ndarray]:
    """Return one image a caption, (128, 128, 3) uint8; image i has the noise of seed + i, whatever the batch."""
    images: list[np.ndarray] = []
    for start in range(0, len(captions), batch):
        prompts = list(captions[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(prompts))]
        output = pipeline(
            prompt=prompts,
            negative_prompt=[" "] * len(prompts) if guidance > 1 else None,
            true_cfg_scale=guidance,
            num_inference_steps=steps,
            height=SIDE_PX,
            width=SIDE_PX,
            generator=generators,
            output_type="np",
        )
        images += list((output.images * 255).round().astype(np.uint8))
    return images


def edit_images(
    pipeline: EditPlusPipeline, instruction: str, images: Sequence[np.ndarray], *, seed: int, guidance: float = CFG
) -> np.ndarray:
    """Return the image that the instruction makes of those shown, (128, 128, 3) uint8."""
    output = pipeline(
        image=[Image.fromarray(image) for image in images],
        prompt=instruction,
        negative_prompt=" " if guidance > 1 else None,
        true_cfg_scale=guidance,
        num_inference_steps=STEPS,
        height=SIDE_PX,
        width=SIDE_PX,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    )
    return (output.images[0] * 255).round().astype(np.uint8)


def score_edits(
    folder: Path, cases: Sequence[tuple[str, str, Edit]], *, seed: int, dtype: torch.dtype, guidance: float
) -> tuple[list[Verdict], list[np.ndarray]]:
    """Return the verdicts, and for each edit one row: two images shown (or one and nothing), and the one made."""
    pipeline = open_edit_folder(folder, SIDE_PX * SIDE_PX, dtype=dtype)
    verdicts, rows = [], []
    for i, (_, text, edit) in enumerate(cases):
        shown, _ = paint_edit(edit, f"held out {i}")
        made = edit_images(pipeline, text, shown, seed=seed + i, guidance=guidance)
        verdicts.append(score_edit(made, edit.target, shown[edit.kept]))
        rows.append(np.concatenate([*shown, *[np.zeros_like(made)] * (2 - len(shown)), made], axis=1))
    return verdicts, rows


def shapes(scene: Scene) -> str:
    return f"{len(scene.items)} shape{'s' * (len(scene.items) > 1)}"


def summarise(cases: Sequence[tuple[str, ...]], verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """Return the part of images right, in all facts (`every fact`) and in each, over all and by each of its groups'
    names in `cases`."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for names, verdict in zip(cases, verdicts, strict=True):
        for group in ("all", *names):
            groups[group].append(verdict)
    return {
        name: {"images": len(members), "every fact": float(np.mean([v.correct for v in members]))}
        | {fact: float(np.mean([v.facts[fact] for v in members])) for fact in members[0].facts}
        for name, members in groups.items()
    }


def write_contact_sheet(path: Path, images: Sequence[np.ndarray], *, width_px: int = 8 * SIDE_PX) -> None:
    columns = max(1, width_px // images[0].shape[1])
    rows = [np.concatenate(images[i : i + columns], axis=1) for i in range(0, len(images), columns)]
    sheet = np.zeros((SIDE_PX * len(rows), rows[0].shape[1], 3), np.uint8)
    for i, row in enumerate(rows):
        sheet[SIDE_PX * i : SIDE_PX * (i + 1), : row.shape[1]] = row
    Image.fromarray(sheet).save(path)


def draw_all(arguments: argparse.Namespace, captions: Sequence[str], dtype: torch.dtype) -> list[np.ndarray]:
    pipeline = QwenImagePipeline.from_pretrained(arguments.folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance": arguments.cfg}
    if arguments.lightning:
        pipeline.load_lora_weights(str(arguments.lightning))
        shift = {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, **shift)
        settings = {"steps": 4, "guidance": 1.0}
    return draw(pipeline, captions, seed=arguments.seed, batch=arguments.batch, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the captions stay the same")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=CFG, help="1: no guidance")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="the computation's")
    parser.add_argument("--sheet", type=Path, help="write the first 64 images here")
    parser.add_argument("--failures", type=int, default=0, help="list so many of the wrong ones")
    parser.add_argument("--edit", action="store_true", help="the folder is an editing miniature: score edits")
    parser.add_argument("--lightning", type=Path, help="a LoRA of distill.py: four steps, no guidance")
    arguments = parser.parse_args()

    start = time.monotonic()
    dtype = getattr(torch, arguments.dtype)
    if arguments.edit:
        edits = held_out_edits(arguments.count)
        wordings = [text for _, text, _ in edits]
        settings = {"seed": arguments.seed, "dtype": dtype, "guidance": arguments.cfg}
        verdicts, images = score_edits(arguments.folder, edits, **settings)
        groups: list[tuple[str, ...]] = [
            (language, edit.kind, f"{edit.kind} {language}") for language, _, edit in edits
        ]
    else:
        captions = held_out_captions(arguments.count)
        wordings = [text for _, text, _ in captions]
        images = draw_all(arguments, wordings, dtype)
        verdicts = [score(image, scene) for image, (_, _, scene) in zip(images, captions, strict=True)]
        groups = [(language, shapes(scene)) for language, _, scene in captions]
    for group, parts in summarise(groups, verdicts).items():
        print(f"{group:13}", json.dumps({name: round(part, 3) for name, part in parts.items()}))
    print(f"{time.monotonic() - start:.0f} s")
    wrong = [i for i, verdict in enumerate(verdicts) if not verdict.correct]
    for i in random.Random(0).sample(wrong, min(arguments.failures, len(wrong))):
        missed = [fact for fact, right in verdicts[i].facts.items() if not right]
        print(i, wordings[i], "| wrong:", missed, "| found:", verdicts[i].background, verdicts[i].found)
    if arguments.sheet:
        write_contact_sheet(arguments.sheet, images[:64])


if __name__ == "__main__":
    main()
