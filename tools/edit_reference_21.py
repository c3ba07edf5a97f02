"""Images that diffusers' QwenImage21Pipeline (0.42) makes of a small folder: one process for all cases.

python edit_reference_21.py <folder> <cases.json> <out.safetensors>; images: PNG files by name.
"""

import json
import sys
from pathlib import Path

from PIL import Image
from safetensors.torch import save_file
from small_pipeline_21 import open_with_diffusers, packed_noise


def main(folder: Path, cases: Path, out: Path) -> None:
    pipeline = open_with_diffusers(folder)
    made = {}
    for name, case in json.loads(cases.read_text(encoding="utf-8")).items():
        size, batch = {"width": case["width"], "height": case["height"]}, case["batch"]
        images = [Image.open(cases.parent / image) for image in case["images"]]
        made[name] = (
            pipeline(
                [case["positive"]] * batch,
                image=images or None,
                negative_prompt=[case["negative"]] * batch,
                true_cfg_scale=case["cfg"],
                num_inference_steps=case["steps"],
                latents=packed_noise(**size, batch=batch, seed=case["seed"]),
                output_resolution=case["resolution"],
                output_type="pt",
                **size,
            )
            .images.permute(0, 2, 3, 1)
            .contiguous()
        )
    save_file(made, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
