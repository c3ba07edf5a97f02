"""Score a miniature on held-out captions: diffusers' own pipeline draws, the scorer looks.

python tools/miniature/evaluate.py miniature --count 200
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
from miniature.data import Scene, held_out_captions
from miniature.scorer import Verdict, score

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
    """Return one picture a caption, (128, 128, 3) uint8; picture i has the noise of seed + i, whatever the batch."""
    pictures: list[np.ndarray] = []
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
        pictures += list((output.images * 255).round().astype(np.uint8))
    return pictures


def summarise(cases: Sequence[tuple[str, str, Scene]], verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """Return the part of pictures right, in all facts (`every fact`) and in each, by language and number of shapes."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for (language, _, scene), verdict in zip(cases, verdicts, strict=True):
        for group in ("all", language, f"{len(scene.items)} shape{'s' * (len(scene.items) > 1)}"):
            groups[group].append(verdict)
    return {
        name: {"captions": len(members), "every fact": float(np.mean([v.correct for v in members]))}
        | {fact: float(np.mean([v.facts[fact] for v in members])) for fact in members[0].facts}
        for name, members in groups.items()
    }


def write_contact_sheet(path: Path, pictures: Sequence[np.ndarray], *, columns: int = 8) -> None:
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    sheet = np.zeros((SIDE_PX * len(rows), rows[0].shape[1], 3), np.uint8)
    for i, row in enumerate(rows):
        sheet[SIDE_PX * i : SIDE_PX * (i + 1), : row.shape[1]] = row
    Image.fromarray(sheet).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the captions stay the same")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="the computation's")
    parser.add_argument("--sheet", type=Path, help="write the first 64 pictures here")
    parser.add_argument("--failures", type=int, default=0, help="list so many of the wrong ones")
    parser.add_argument("--lightning", type=Path, help="a LoRA of distill.py: four steps, no guidance")
    arguments = parser.parse_args()

    pipeline = QwenImagePipeline.from_pretrained(arguments.folder, torch_dtype=getattr(torch, arguments.dtype))
    pipeline.set_progress_bar_config(disable=True)
    cases = held_out_captions(arguments.count)
    start = time.monotonic()
    settings = {}
    if arguments.lightning:
        pipeline.load_lora_weights(str(arguments.lightning))
        shift = {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, **shift)
        settings = {"steps": 4, "guidance": 1.0}
    captions = [text for _, text, _ in cases]
    pictures = draw(pipeline, captions, seed=arguments.seed, batch=arguments.batch, **settings)
    verdicts = [score(picture, scene) for picture, (_, _, scene) in zip(pictures, cases, strict=True)]
    for group, parts in summarise(cases, verdicts).items():
        print(f"{group:9}", json.dumps({name: round(part, 3) for name, part in parts.items()}))
    print(f"{time.monotonic() - start:.0f} s")
    wrong = [i for i, verdict in enumerate(verdicts) if not verdict.correct]
    for i in random.Random(0).sample(wrong, min(arguments.failures, len(wrong))):
        missed = [fact for fact, right in verdicts[i].facts.items() if not right]
        print(i, cases[i][1], "| wrong:", missed, "| found:", verdicts[i].background, verdicts[i].found)
    if arguments.sheet:
        write_contact_sheet(arguments.sheet, pictures[:64])


if __name__ == "__main__":
    main()
