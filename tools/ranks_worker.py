"""What tests have each of several processes do, started by torchrun: FOLDER MODEL EXAMPLE [--kill].

Each process writes what it saw to FOLDER/<rank>.pt: latents by the name of their case, errors by that of what was
wrong. The example then makes an image of the same model. --kill: process 1 is killed in the middle of an image.
"""

import errno
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from qwenimage_lowvram.engine.compute.context_parallel import RankLost
from qwenimage_lowvram.engine.compute.step_schedules import Measured, StepSchedule
from qwenimage_lowvram.engine.errors import QwenLowVRAMError
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.runs.pipeline import Pipeline
from qwenimage_lowvram.engine.runs.ranks import ranks_of_torchrun

PROMPT, NEGATIVE = 'a sign that says "红色"', "blurry"
TABLE = StepSchedule("of a test", 6, (0, 1, 3, 5), Measured("", 0, 0))
# 35 tokens of the image, and 13 and 7 of the prompts: neither is shared evenly
SIZE: dict[str, Any] = {"width": 112, "height": 80, "seed": 5, "steps": 4}
CASES: dict[str, dict[str, Any]] = {
    "guided": {},
    "of two images": {"batch": 2, "cfg": 1.0},
    "of a table": {"steps": 6, "cfg": 1.0, "step_cache": TABLE},
    "an edit": {"images": [torch.rand(1, 64, 48, 3, generator=torch.Generator().manual_seed(0))], "megapixels": 0.0},
}
TIMEOUT_SECONDS = 120.0
CHECKS = 8  # times that somebody may interrupt, then one is killed: in the second step's blocks


def tight_limit(pipeline: Pipeline) -> int:
    """With which blocks are streamed; of the last image's request."""
    footprint = pipeline._transformer.footprint
    return least_bytes(footprint, pipeline.report.sampling.plan.request)


def made(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    """Of all cases."""
    return {name: pipeline.make_latents(PROMPT, NEGATIVE, **{**SIZE, **case}) for name, case in CASES.items()}


def refused(pipeline: Pipeline, rank: int) -> dict[str, str]:
    """What each process is told of what they cannot make together."""
    wrong: dict[str, dict[str, Any]] = {
        "other seeds": {"seed": rank},
        "a rule": {"step_cache": "first_block"},
        "fewer tokens": {"width": 16, "height": 16},
    }
    told = {}
    for name, asked in wrong.items():
        try:
            pipeline.make_latents(PROMPT, NEGATIVE, **{**SIZE, **asked})
        except QwenLowVRAMError as error:
            told[name] = f"{error.code}: {error}"
    return told


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of the cache finds room."""
    with patch.object(os, "fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) as written:
        yield
    assert written.called


def together(folder: Path, model: Path) -> None:
    with ranks_of_torchrun(device=torch.device("cpu"), timeout_seconds=TIMEOUT_SECONDS) as ranks:
        with Pipeline.open(model, ranks=ranks) as pipeline:
            latents, errors = made(pipeline), refused(pipeline, ranks.rank)
            text = str(pipeline.report.sampling.plan)
            limit, link = tight_limit(pipeline), pipeline.report.sampling.plan.request.link
        tight = {"vram_limit_bytes": limit, "cache": folder / "cache"}
        with full_disk(), Pipeline.open(model, ranks=ranks, **tight) as pipeline:
            latents["streamed"] = pipeline.make_latents(PROMPT, NEGATIVE, **SIZE)
            streamed = pipeline.report.sampling.plan.streamed
    seen = {"latents": latents, "errors": errors, "plan": text, "streamed": streamed, "link": asdict(link)}
    torch.save(seen, folder / f"{ranks.rank}.pt")


def until_killed(folder: Path, model: Path) -> None:
    checks, killed_at, rank = 0, 0, int(os.environ["RANK"])

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == killed_at and rank == 1:
            (folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with (
            ranks_of_torchrun(device=torch.device("cpu"), timeout_seconds=TIMEOUT_SECONDS) as ranks,
            Pipeline.open(model, ranks=ranks, check=check) as pipeline,
        ):
            prompts = pipeline.encode([PROMPT, NEGATIVE])
            pipeline.sample(prompts, **SIZE)
            killed_at = checks + CHECKS
            pipeline.sample(prompts, **SIZE)
    except RankLost as error:
        (folder / f"lost {rank}").write_text(f"{time.time()} {error}")
        raise


def main() -> None:
    folder, model, example, *options = sys.argv[1:]
    together(Path(folder), Path(model))
    if "--kill" in options:
        until_killed(Path(folder), Path(model))
    size = ("--timeout", "120", "--width", "112", "--height", "80", "--steps", "4", "--seed", "5")
    sys.argv = [example, PROMPT, model, str(Path(folder) / "image.png"), "--negative", NEGATIVE, *size]
    runpy.run_path(example, run_name="__main__")


if __name__ == "__main__":
    main()
