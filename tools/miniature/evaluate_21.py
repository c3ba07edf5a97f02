"""Score 2.1's miniature on held-out captions and edits: diffusers' own pipeline draws, the scorer looks.

python tools/miniature/evaluate_21.py miniature-2.1 --count 200
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_pipeline_21 import open_with_diffusers

from miniature.evaluate import shapes, summarise
from miniature.rgba import (
    SIDE_PX,
    TRANSPARENT,
    asked_captions,
    asked_edits,
    lay_down,
    paint_edit,
    score_rgba,
    score_rgba_edit,
)

STEPS, CFG = 20, 4.0
LEAST_PX = 32 * 32


def make(pipeline: Any, text: str, shown: np.ndarray | None, *, seed: int, steps: int, cfg: float) -> np.ndarray:
    """The image that the pipeline draws, or makes of the one shown, (SIDE_PX, SIDE_PX, 4) uint8."""
    output = pipeline(
        prompt=text,
        image=None if shown is None else Image.fromarray(shown),
        negative_prompt=" " if cfg > 1 else None,
        true_cfg_scale=cfg,
        num_inference_steps=steps,
        height=SIDE_PX,
        width=SIDE_PX,
        output_resolution=SIDE_PX,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    )
    return np.asarray((output.images[0] * 255).round().astype(np.uint8))


def report(title: str, cases: Sequence[tuple[str, ...]], verdicts: Sequence[Any]) -> None:
    for group, parts in summarise(cases, verdicts).items():
        print(f"{title} {group:20}", json.dumps({name: round(part, 3) for name, part in parts.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200, help="captions, and edits; a quarter as many are transparent")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the captions stay the same")
    parser.add_argument("--cfg", type=float, default=CFG, help="1: no guidance")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sheet", type=Path, help="write the first 64 images and edits here")
    arguments = parser.parse_args()

    start = time.monotonic()
    pipeline = open_with_diffusers(arguments.folder, least_px=LEAST_PX).to(torch.float32)
    settings = {"steps": arguments.steps, "cfg": arguments.cfg}
    verdicts, names, rows = [], [], []
    for i, (language, text, scene) in enumerate(asked_captions(arguments.count)):
        image = make(pipeline, text, None, seed=arguments.seed + i, **settings)
        verdicts.append(score_rgba(image, scene))
        names.append((TRANSPARENT,) if scene.background == TRANSPARENT else ("held out", language, shapes(scene)))
        rows.append(lay_down(image))
    report("draw", names, verdicts)
    verdicts, names, edited = [], [], []
    for i, (language, text, edit) in enumerate(asked_edits(arguments.count)):
        shown, _ = paint_edit(edit, f"held out {i}")
        image = make(pipeline, text, shown, seed=arguments.seed + i, **settings)
        verdicts.append(score_rgba_edit(image, edit.target, shown))
        removes = edit.target.background == TRANSPARENT
        names.append((TRANSPARENT,) if removes else ("held out", language, edit.kind))
        edited.append(np.concatenate([lay_down(shown), lay_down(image)], axis=1))
    report("edit", names, verdicts)
    print(f"{time.monotonic() - start:.0f} s")
    if arguments.sheet:
        sheet = [np.concatenate(rows[i : i + 16], axis=1) for i in range(0, min(64, len(rows) // 16 * 16), 16)]
        sheet += [np.concatenate(edited[i : i + 8], axis=1) for i in range(0, min(64, len(edited) // 8 * 8), 8)]
        Image.fromarray(np.concatenate(sheet)).save(arguments.sheet)


if __name__ == "__main__":
    main()
