"""One image by several processes, a card each: each has a part of its tokens, and streams the model's blocks by itself.

    python -m torch.distributed.run --standalone --nproc-per-node=2 docs/examples/one_image_on_several_cards.py \\
        "a cat that holds a sign" models/Qwen-Image cat.png --vram 8

For Qwen-Image of the 20B family, also for its Edit models (--edit IMAGE, up to three times); the number of processes
divides its 24 heads of attention. On several machines start torchrun on each with --nnodes, --node-rank and
--master-addr; every machine needs the model, the images and this folder. Where a process ends, all end with an error,
and no image appears.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PACK = Path(__file__).resolve().parents[2]  # whose `engine` is imported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("model", type=Path, help="a pipeline folder, with model_index.json")
    parser.add_argument("image", type=Path, help="the PNG file to write")
    parser.add_argument("--negative", default=" ", help="needs as many tokens as there are processes; a space has 6")
    parser.add_argument("--edit", type=Path, action="append", default=[], help="an image to change, once for each")
    parser.add_argument("--vram", type=float, help="limit of each process in GiB; without it, what is free on its card")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a process waits for the others")
    parser.add_argument("--width", type=int, default=1328)
    parser.add_argument("--height", type=int, default=1328)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    options = parser.parse_args()
    sys.path.insert(0, str(PACK))
    from PIL import Image

    from engine.errors import QwenLowVRAMError
    from engine.files.atomic_files import whole_file
    from engine.runs.pipeline import GIB, Pipeline
    from engine.runs.ranks import ranks_of_torchrun

    limit = None if options.vram is None else int(options.vram * GIB)
    size = {"width": options.width, "height": options.height, "steps": options.steps, "cfg": options.cfg}
    try:
        with (
            ranks_of_torchrun(timeout_seconds=options.timeout) as ranks,
            Pipeline.open(options.model, vram_limit_bytes=limit, ranks=ranks) as pipeline,
        ):
            images = [pixels_of(file) for file in options.edit]
            latents = pipeline.make_latents(options.prompt, options.negative, **size, seed=options.seed, images=images)
            if ranks.first:
                image = pipeline.decode(latents)[0]
                with whole_file(options.image) as stream:
                    Image.fromarray((image * 255).round().byte().numpy()).save(stream, "PNG")
                print(options.image, flush=True)
    except QwenLowVRAMError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def pixels_of(file: Path) -> "Tensor":
    """(1, H, W, 3) in 0..1."""
    import torch
    from PIL import Image

    with Image.open(file) as image:
        rgb = image.convert("RGB")
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(1, rgb.height, rgb.width, 3) / 255


if __name__ == "__main__":
    main()
