"""What the numbers of the weights cost the image: the miniature in each format, exact and fast, with a LoRA or none.

    python dev.py bench precision

Captions that the miniature was not trained on, one seed each, 128x128: 20 steps with guidance, or 4 with its Lightning
LoRA and none. `error_mean` is the norm of the difference of the latents over the norm of those in fp32, in the mean
over the captions; `right` is the part of images in which the scorer finds every fact of the caption. `weights_bytes`
are all blocks as they lie on the device, `peak_bytes` what the plan says of the device with all of them there,
`seconds` those of a step on this machine. Exact computes on decoded weights in bf16 (in fp32 for fp32), fast by
products with int8 weights.

Where there is a CUDA device, rows of it follow: a guided step at 1328x1328 of 60 blocks of the real size, of random
weights, on 8 GB of the card. `seconds` and `peak_bytes` are measured there; `error_mean` is the largest difference from
everything resident in the same format, over the largest number.

**It says nothing of the real models' images**: their weights are others, and rotated int8 turns 256 neighbours of a
row together, here 64.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from miniature.data import Scene, held_out_captions
from miniature.scorer import score
from on_gpu.blocks import do
from on_gpu.cases import REAL
from on_gpu.precision import on_card
from qwenimage_lowvram.engine.runs.pipeline import Pipeline
from stored_miniature import MINIATURE, miniature_in
from torch import Tensor

LORA = MINIATURE / "lightning-4steps.safetensors"
SIDE = 128
COUNT, QUICK = 24, 1
# name: the file's format, what is computed in, on what linear layers compute
FORMATS = {
    "FP32": ("bf16", torch.float32, "exact"),
    "BF16": ("bf16", torch.bfloat16, "exact"),
    "FP8 scaled": ("fp8_scaled", torch.bfloat16, "exact"),
    "INT8 by row, exact": ("int8_row", torch.bfloat16, "exact"),
    "INT8 by row, fast": ("int8_row", torch.bfloat16, "fast"),
    "INT8 rotated, exact": ("int8_convrot", torch.bfloat16, "exact"),
    "INT8 rotated, fast": ("int8_convrot", torch.bfloat16, "fast"),
    "INT4 (nf4)": ("nf4", torch.bfloat16, "exact"),
    "INT4 (GGUF Q4_0)": ("gguf_q4_0", torch.bfloat16, "exact"),
}


@dataclass(frozen=True)
class _Drawn:
    latents: Tensor
    right: bool
    seconds: float
    weights_bytes: int
    peak_bytes: int


def rows(quick: bool) -> list[dict[str, Any]]:
    captions = held_out_captions(COUNT, seed=0)[: QUICK if quick else COUNT]
    made: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for lora in (False, True):
            exact: list[_Drawn] = []
            for name, (stored, dtype, compute) in FORMATS.items():
                files = miniature_in(stored, Path(scratch))
                settings: dict[str, Any] = {"dtype": dtype, "compute": compute, "device": "cpu"}
                with Pipeline(files, **settings, loras=[(LORA, 1.0)] if lora else []) as pipeline:
                    drawn = list(_draw(pipeline, captions, lora=lora))
                exact = exact or drawn
                made.append(_row(name, "4 steps, LoRA" if lora else "20 steps", drawn, exact))
        if torch.cuda.is_available():
            made += on_card(Path(scratch), REAL, "cuda", do)
    return made


def _draw(pipeline: Pipeline, captions: Sequence[tuple[str, str, Scene]], *, lora: bool) -> Iterator[_Drawn]:
    steps, cfg = (4, 1.0) if lora else (20, 4.0)
    for seed, (_, caption, scene) in enumerate(captions):
        prompts = pipeline.encode([caption] if lora else [caption, " "])
        latents = pipeline.sample(prompts, width=SIDE, height=SIDE, steps=steps, cfg=cfg, seed=seed)
        report = pipeline.report.sampling
        assert report is not None
        plan = report.plan
        assert len(plan.resident) == plan.blocks
        image = (pipeline.decode(latents)[0].float() * 255).round().to(torch.uint8).numpy()
        yield _Drawn(
            latents.float(),
            score(image, scene).correct,
            report.pass_seconds / report.passes,
            plan.resident_bytes,
            plan.peak_bytes,
        )


def _row(name: str, case: str, drawn: Sequence[_Drawn], exact: Sequence[_Drawn]) -> dict[str, Any]:
    errors = [
        float((one.latents - wanted.latents).norm() / wanted.latents.norm())
        for one, wanted in zip(drawn, exact, strict=True)
    ]
    return {
        "who": name,
        "case": case,
        "seconds": sorted(one.seconds for one in drawn)[len(drawn) // 2],
        "weights_bytes": drawn[0].weights_bytes,
        "peak_bytes": drawn[0].peak_bytes,
        "error_mean": sum(errors) / len(errors),
        "right": sum(one.right for one in drawn) / len(drawn),
    }
