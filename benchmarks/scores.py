"""How many images show what was asked for, in each format that can be computed as it is stored, exact and fast.

    python dev.py bench scores

200 captions that the miniature was not trained on, one seed each, the same in every row: 128x128, 4 steps with its
Lightning LoRA. `right` are the images in which the scorer finds every fact of the caption; `less` is by how many that
is fewer than in bf16, computed exactly; `others` are the captions for which the two disagree. fast: products with the
stored numbers, activations quantized as the format defines, the LoRA as side products. A format that this machine's
comfy-kitchen does not compute as stored has no row. It says nothing of the real models' images: their weights are
others.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from kitchen_w4a8 import has_w4a8
from miniature.data import Scene, held_out_captions
from miniature.scorer import score
from qwenimage_lowvram.engine.runs.pipeline import Pipeline
from stored_miniature import MINIATURE, miniature_in

LORA = MINIATURE / "lightning-4steps.safetensors"
SIDE, STEPS = 128, 4
COUNT, QUICK = 200, 2
FORMATS = ("int8", "int8_row", "int8_convrot", "fp8mixed", "convrot_w4a4", "asym_w4a8_int8", "nvfp4", "mxfp8")


def rows(quick: bool) -> list[dict[str, Any]]:
    captions = held_out_captions(COUNT, seed=0)[: QUICK if quick else COUNT]
    with tempfile.TemporaryDirectory() as scratch:
        exact, _ = _right("bf16", "exact", captions, Path(scratch))
        made = [_row("bf16", "exact", exact, exact)]
        for stored in FORMATS:
            if stored == "asym_w4a8_int8" and not has_w4a8():
                continue
            right, computed = _right(stored, "fast", captions, Path(scratch))
            if not computed:
                continue
            decoded, _ = _right(stored, "exact", captions, Path(scratch))
            made += [_row(stored, "exact", decoded, exact), _row(stored, f"fast: {computed}", right, exact)]
    return made


def _right(stored: str, compute: str, captions: list[tuple[str, str, Scene]], scratch: Path) -> tuple[list[bool], str]:
    """Whether each image is right, in the captions' order; and what computes on stored numbers, empty if nothing.

    With compute "fast" and nothing that computes so, only one image is made.
    """
    found: list[bool] = []
    files = miniature_in(stored, scratch)
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "compute": compute, "device": "cpu"}
    with Pipeline(files, **settings, loras=[(LORA, 1.0)]) as pipeline:
        for seed, (_, caption, scene) in enumerate(captions):
            prompts = pipeline.encode([caption])
            latents = pipeline.sample(prompts, width=SIDE, height=SIDE, steps=STEPS, cfg=1.0, seed=seed)
            assert pipeline.report.sampling is not None
            computed = pipeline.report.sampling.plan.linear
            if compute == "fast" and not computed:
                return [], ""
            image = (pipeline.decode(latents)[0].float() * 255).round().to(torch.uint8).numpy()
            found.append(score(image, scene).correct)
    return found, computed


def _row(who: str, case: str, right: list[bool], exact: list[bool]) -> dict[str, Any]:
    return {
        "who": who,
        "case": case,
        "images": len(right),
        "right": sum(right),
        "less": sum(exact) - sum(right),
        "others": sum(one != wanted for one, wanted in zip(right, exact, strict=True)),
    }
