"""Images that diffusers' QwenImage21Pipeline (0.42) makes of a small folder: one process for all cases.

python edit_reference_21.py <folder> <cases.json> <out.safetensors>; images: PNG files by name.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devtools.cache import REPOSITORY
from devtools.overlay import NEWEST, prepare_overlay
from PIL import Image
from safetensors.torch import load_file, save_file
from small_pipeline_21 import open_with_diffusers, packed_noise, without_shift
from torch import Tensor


def reference_images(folder: Path, work: Path, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """(batch, height, width, 4) by case, made in a process that sees the newest packages. `work` holds the images."""
    (work / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    newest = prepare_overlay(NEWEST, Path(sys.executable))
    paths = [str(newest), str(REPOSITORY / "tools" / "alias"), str(REPOSITORY / "tools")]
    subprocess.run(
        [sys.executable, __file__, folder, work / "cases.json", work / "made.safetensors"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=True,
        timeout=600,
    )
    return load_file(work / "made.safetensors")


def main(folder: Path, cases: Path, out: Path) -> None:
    pipeline = open_with_diffusers(folder)
    own, shifts_nothing = pipeline.scheduler, without_shift(pipeline.scheduler)
    made = {}
    for name, case in json.loads(cases.read_text(encoding="utf-8")).items():
        size, batch = {"width": case["width"], "height": case["height"]}, case["batch"]
        images = [Image.open(cases.parent / image) for image in case["images"]]
        sigmas = case.get("sigmas")  # of Turbo
        pipeline.scheduler = shifts_nothing if sigmas else own
        schedule = {"sigmas": sigmas} if sigmas else {"num_inference_steps": case["steps"]}
        made[name] = (
            pipeline(
                [case["positive"]] * batch,
                image=images or None,
                negative_prompt=[case["negative"]] * batch,
                true_cfg_scale=case["cfg"],
                latents=packed_noise(**size, batch=batch, seed=case["seed"]),
                output_resolution=case["resolution"],
                output_type="pt",
                **schedule,
                **size,
            )
            .images.permute(0, 2, 3, 1)
            .contiguous()
        )
    save_file(made, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
