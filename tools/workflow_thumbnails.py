"""Make the bundled workflows' thumbnails: each runs on the miniatures in a real server, until its image is right.

    PYTHONPATH=tools/alias:tools python tools/workflow_thumbnails.py [PART ...]

those with one of the parts in their names, or all. What no miniature can do keeps its thumbnail: three images with
Qwen-Image-2.1.
"""

import argparse
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from devtools.cache import REPOSITORY
from devtools.client import ComfyClient
from devtools.comfyui import require_comfyui
from devtools.server import ComfyServer
from devtools.workflow import set_widgets, to_prompt
from miniature.rgba import SIDE_PX as SIDE_21_PX
from PIL import Image
from thumbnails import scenes
from thumbnails.poster import checkered, poster, veiled
from workflow_maker.catalogue import Workflow, workflows

FOLDER = REPOSITORY / "workflows"
TRIES = 24
GUIDED = {"preset": "as set", "scheduler": "qwen_image", "steps": 20, "cfg": 4.0}
LORA = "lightning-4steps.safetensors"
MEGAPIXELS = scenes.SIDE_PX**2 / 1024**2
BYPASSED = 4
SAVED = "6"  # the node whose image is the model's
FOOT = "made by the miniature, a tiny model that only draws shapes"
FOOT_21 = "made by 2.1's miniature, which only knows shapes · Qwen-Image-2.1: non-commercial use only"
EDITING_FOOT = "made by the editing miniature, a tiny model that only knows shapes"
_FROM_AN_IMAGE = {
    "Image to image": scenes.image_to_image, "Inpaint": scenes.inpaint, "Outpaint": scenes.outpaint,
}  # fmt: skip
DRAWN_FOOT = "a drawing: no tiny model takes images apart"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="of the names")
    parts = parser.parse_args().parts
    wanted = [(stem, each) for stem, each in workflows() if not parts or any(part in stem for part in parts)]
    with serving() as (server, client):
        studio = Studio(server, client)
        for stem, workflow in wanted:
            make = studio.thumbnail_21 if workflow.licence else studio.thumbnail
            thumbnail = make(stem, workflow)
            if thumbnail is not None:
                thumbnail.save(FOLDER / f"{stem}.jpg", quality=88, optimize=True)
                print(stem, flush=True)


@contextmanager
def serving() -> Iterator[tuple[ComfyServer, ComfyClient]]:
    """A server with the miniatures, in a folder that goes afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        server = ComfyServer(require_comfyui(), Path(folder), cpu=True)
        for name in ("miniature", "miniature-edit", "miniature-2.1"):
            shutil.copytree(REPOSITORY / name, server.base / "models" / "diffusers" / name)
        shutil.copy(REPOSITORY / "miniature" / LORA, server.base / "models" / "loras")
        Image.new("RGB", (64, 64)).save(server.base / "input" / "example.png")  # which ComfyUI brings
        with server:
            yield server, ComfyClient(server.url)


@dataclass(frozen=True)
class Asked:
    """What a workflow can be asked for: `draw` makes a task by chance, `model` is the miniature that does it, sample:
    Sample's widgets where they are others than the workflow's."""

    draw: Callable[[random.Random], scenes.Task]
    model: str
    sample: Mapping[str, Any]


def asked_of(stem: str, workflow: Workflow) -> Asked | None:
    """None of what no miniature can do."""
    title = workflow.title
    several = "three" in title
    if "layers" in title or (workflow.licence and several):
        return None
    if workflow.licence:  # those of 2.1 have one
        draw = scenes.edit_21 if "Edit" in title or "Remove" in title else scenes.from_text_21
        return Asked(partial(draw, clear="Turbo" not in stem), "miniature-2.1", GUIDED)
    if "Edit" in title:
        return Asked(partial(scenes.edit, several=several), "miniature-edit", GUIDED)
    return Asked(_FROM_AN_IMAGE.get(title, scenes.from_text), "miniature", {})


class Studio:
    """Runs workflows on the miniatures and lays out what they make."""

    def __init__(self, server: ComfyServer, client: ComfyClient) -> None:
        self._input, self._client = server.base / "input", client
        self._object_info = client.object_info()

    def thumbnail(self, stem: str, workflow: Workflow) -> Image.Image:
        card, asked = workflow.card_gb, asked_of(stem, workflow)
        if asked is None:
            whole, layers = scenes.drawn_layers(random.Random(stem))
            shown = [checkered(layer) for layer in layers]
            return poster(card, "Layers", [whole], shown, "Takes an image apart into layers", DRAWN_FOOT)
        task, made = self._right(stem, asked)
        if "Edit" in workflow.title:
            kind = workflow.title.split(", ")[1].replace(" in ", "\nin ")
            return poster(card, kind, [*map(Image.fromarray, task.given)], [made], task.words, EDITING_FOOT)
        kind, given = workflow.title, []
        if workflow.title not in _FROM_AN_IMAGE:
            kind = "Lightning\n8 steps" if "Lightning" in kind else f"{kind}\n20 steps, guided"
        else:
            given = [Image.fromarray(task.given[0])]
            given = [veiled(given[0], 0.5, 0, 1, 1)] if workflow.title == "Inpaint" else given
        return poster(card, kind, given, [made], task.words, FOOT)

    def thumbnail_21(self, stem: str, workflow: Workflow) -> Image.Image | None:
        asked = asked_of(stem, workflow)
        if asked is None:
            return None
        task, made = self._right(stem, asked)
        kind = "\n".join(part.strip() for part in workflow.title.split(","))
        given = [Image.fromarray(image) for image in task.given]
        return poster(workflow.card_gb, kind, given, [checkered(made)], task.words, FOOT_21)

    def _right(self, stem: str, asked: Asked) -> tuple[scenes.Task, Image.Image]:
        """The first task that is done right. Raises RuntimeError after TRIES."""
        for chance in range(TRIES):
            task = asked.draw(random.Random(f"{stem} {chance}"))
            image = self._run(self.graph(stem, task, asked, seed=chance), asked)
            if task.right(np.asarray(image)):
                return task, image
        raise RuntimeError(f"{stem}: no image of {TRIES} shows what it should.")

    def graph(self, stem: str, task: scenes.Task, asked: Asked, **sample: Any) -> dict[str, Any]:
        """The workflow with the miniature's files and the task's images; sample: Sample's widgets."""
        model = asked.model
        graph = json.loads((FOLDER / f"{stem}.json").read_text(encoding="utf-8"))
        self._show(graph, task.files)
        folder = "from the folder"
        side_px = SIDE_21_PX if model == "miniature-2.1" else scenes.SIDE_PX
        changes: dict[str, dict[str, Any]] = {
            "QwenLowVRAMLoader": {
                "transformer": f"{model} (folder)", "text_encoder": folder, "vae": folder, "variant": "auto",
            },
            "QwenLowVRAMLoadLora": {"lora_name": LORA},
            "QwenLowVRAMEncodePrompts": scenes.asked(task),
            "QwenLowVRAMEncodeEditPrompt": {**scenes.asked(task), "megapixels": 0.0},
            "EmptySD3LatentImage": {"width": side_px, "height": side_px},
            "ImageScaleToTotalPixels": {"megapixels": MEGAPIXELS},
            "GrowMask": {"expand": 4},
            "ImageBlur": {"blur_radius": 2},
            "ImagePadForOutpaint": {"left": 0, "right": scenes.HALF, "feathering": 4},
            "QwenLowVRAMSample": {**asked.sample, **sample},
        }  # fmt: skip
        for kind, values in changes.items():
            graph = set_widgets(graph, self._object_info, kind, **values)
        for node in graph["nodes"]:
            if node["type"] == "QwenLowVRAMLoadLora" and model != "miniature":
                node["mode"] = BYPASSED  # it is the drawing miniature's
        return graph

    def _run(self, graph: dict[str, Any], asked: Asked) -> Image.Image:
        run = self._client.run(to_prompt(graph, self._object_info))
        image = Image.open(io.BytesIO(self._client.image(run.outputs[SAVED]["images"][0])))
        return image.convert("RGBA" if asked.model == "miniature-2.1" else "RGB")

    def _show(self, graph: dict[str, Any], files: list[np.ndarray]) -> None:
        """Put the images into the input folder, and what is left of the graph's loaders aside."""
        loaders = [node for node in graph["nodes"] if node["type"] == "LoadImage"]
        for number, node in enumerate(loaders):
            if number < len(files):
                name = f"thumbnail{number}.png"
                Image.fromarray(files[number]).save(self._input / name)
                node["widgets_values"][0] = name
            else:
                node["mode"] = 2  # the editing miniature knows two images


if __name__ == "__main__":
    main()
