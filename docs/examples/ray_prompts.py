"""An image of every line of a text file, by the workers of a Ray cluster: one card each, within the engine's limits.

    pip install ray
    python docs/examples/ray_prompts.py prompts.txt models/Qwen-Image images --workers 2 --vram 8

Every machine needs the model, this folder and FOLDER at the same path; a network drive will do. An image's file appears
whole or not at all, and carries its line's number, which is its seed, too: where a worker dies, only the image that it
was making is made again, and a second call makes only what is missing.
"""

import argparse
import sys
from pathlib import Path

import ray

PACK = Path(__file__).resolve().parents[2]  # whose `engine` the workers import


class Painter:
    """A worker: an engine of its own, which keeps its blocks on the card from image to image."""

    def __init__(self, options: argparse.Namespace) -> None:
        sys.path.insert(0, str(options.pack))
        from engine.runs.pipeline import GIB, Pipeline

        limit = None if options.vram is None else int(options.vram * GIB)
        self.settings, self.pipeline = (
            options,
            Pipeline.open(options.model, vram_limit_bytes=limit, cache=options.cache),
        )

    def paint(self, number: int, prompt: str) -> Path:
        from PIL import Image

        from engine.files.atomic_files import whole_file

        options = self.settings
        file: Path = options.folder / f"{number:05d}.png"
        if not file.exists():
            size = {"width": options.width, "height": options.height, "steps": options.steps, "cfg": options.cfg}
            image = self.pipeline.make(prompt, **size, seed=number)[0]
            with whole_file(file) as stream:
                Image.fromarray((image * 255).round().byte().numpy()).save(stream, "PNG")
        return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="a text file, one prompt a line")
    parser.add_argument("model", type=Path, help="a pipeline folder, with model_index.json")
    parser.add_argument("folder", type=Path, help="where the images go")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--vram", type=float, help="limit of each worker in GiB; without it, what is free on its card")
    parser.add_argument("--cache", type=Path, help="a folder for encoded prompts, which all workers may share")
    parser.add_argument("--width", type=int, default=1328)
    parser.add_argument("--height", type=int, default=1328)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    options = parser.parse_args()
    options.pack, options.model, options.folder = PACK, options.model.resolve(), options.folder.resolve()
    prompts = options.prompts.read_text(encoding="utf-8").splitlines()

    ray.init(include_dashboard=False, log_to_driver=False)  # with RAY_ADDRESS: the cluster there
    card = 1 if ray.cluster_resources().get("GPU") else 0
    painter = ray.remote(num_cpus=1, num_gpus=card, max_restarts=-1, max_task_retries=-1)(Painter)
    painters = [painter.remote(options) for _ in range(options.workers)]
    pool = ray.util.ActorPool(painters)
    jobs = [(number, prompt) for number, prompt in enumerate(prompts) if prompt.strip()]
    for done, file in enumerate(pool.map_unordered(lambda painter, job: painter.paint.remote(*job), jobs), start=1):
        print(f"{done}/{len(jobs)} {file.name}", flush=True)


if __name__ == "__main__":
    main()
