"""What steps that are not computed cost the image, and save: the miniature, against itself with every step computed.

    python dev.py bench steps

Captions that the miniature was not trained on, one seed each, 128x128, 40 steps, fp32 on the CPU, with the reference's
schedule and no block resident. `error_mean` and `error_max` are the norm of the difference of the latents over the norm
of those of all steps, over the captions; `right` is the part of images in which the scorer finds every fact of the
caption. `blocks_read` are blocks fetched per image. `evenly` are as many computed steps at
equal distances, with the first two: what the tables are worth.

**It says nothing about the real models**: a network of 4 blocks is not one of 32 or 60.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from miniature.data import Scene, held_out_captions
from miniature.scorer import score
from qwenimage_lowvram.engine.compute.step_schedules import FIRST_BLOCK, OFF, STEP_SCHEDULES, StepCache
from qwenimage_lowvram.engine.runs.pipeline import Pipeline
from torch import Tensor

MINIATURE = Path(__file__).parents[1] / "miniature"
STEPS, SIDE = 40, 128
COUNT, QUICK = 8, 2
LIMIT_BYTES = 8_000_000  # too little for a block to stay
GUIDED = {"cfg 4": 4.0, "cfg 1": 1.0}


@dataclass(frozen=True)
class _Drawn:
    latents: Tensor
    right: bool
    fetched_blocks: int
    computed: int


def rows(quick: bool) -> list[dict[str, Any]]:
    captions = held_out_captions(COUNT, seed=0)[: QUICK if quick else COUNT]
    made: list[dict[str, Any]] = []
    with Pipeline.open(MINIATURE, device="cpu", dtype=torch.float32, vram_limit_bytes=LIMIT_BYTES) as pipeline:
        for case, cfg in GUIDED.items():
            exact = list(_draw(pipeline, captions, cfg, None))
            made.append(_row(OFF, case, exact, exact))
            for cache in _caches():
                made.append(_row(cache.name, case, list(_draw(pipeline, captions, cfg, cache)), exact))
    return made


def _caches() -> Iterator[StepCache]:
    for schedule in STEP_SCHEDULES.values():
        yield schedule
        count = len(schedule.computed)
        rest = [1 + round(i * (STEPS - 2) / (count - 2)) for i in range(1, count - 1)]
        yield replace(schedule, name=f"evenly {count}", computed=(0, 1, *rest))
    yield FIRST_BLOCK


def _draw(
    pipeline: Pipeline, captions: Sequence[tuple[str, str, Scene]], cfg: float, cache: StepCache | None
) -> Iterator[_Drawn]:
    size = {"width": SIDE, "height": SIDE, "steps": STEPS, "cfg": cfg}
    for seed, (_, caption, scene) in enumerate(captions):
        prompts = pipeline.encode([caption, " "] if cfg > 1 else [caption])
        latents = pipeline.sample(prompts, **size, seed=seed, step_cache=cache or OFF)
        report = pipeline.report.sampling
        assert report is not None
        assert not report.plan.resident
        image = (pipeline.decode(latents)[0] * 255).round().to(torch.uint8).numpy()
        right = score(image, scene).correct
        yield _Drawn(latents, right, report.fetched_blocks, report.computed_steps or report.passes)


def _row(name: str, case: str, drawn: Sequence[_Drawn], exact: Sequence[_Drawn]) -> dict[str, Any]:
    errors = [
        float((one.latents - wanted.latents).norm() / wanted.latents.norm())
        for one, wanted in zip(drawn, exact, strict=True)
    ]
    count = len(drawn)
    return {
        "who": name,
        "case": case,
        "computed": sum(one.computed for one in drawn) / count,
        "blocks_read": sum(one.fetched_blocks for one in drawn) / count,
        "error_mean": sum(errors) / count,
        "error_max": max(errors),
        "right": sum(one.right for one in drawn) / count,
    }
