"""Run every bundled workflow in a real page as a person does: to its image, and once more until it is cancelled; and
bring them to the errors of `page_errors`.

    PYTHONPATH=tools/alias:tools python tools/page_runs.py [--in classic-nodes,en] [--errors] [PART ...]

those with one of the parts in their names, or all; in both renderers and languages, or in one; --errors: the errors
alone. The miniatures make the images; what none has learned makes one without sense. Prints a line for each run, keeps
what the page looked like in .pytest_cache/screenshots, and ends with 1 where one went another way. Needs the browser
that `python dev.py test` sets up; a pair takes five minutes on two cores.
"""

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, product
from typing import Any

import numpy as np
from devtools.browser import PageTools, find_page_tools
from devtools.cache import cache_folder
from devtools.comfyui import comfyui_version, require_comfyui
from devtools.environment import venv_folder
from devtools.page import Page
from devtools.workflow import set_widgets
from page_errors import WRONGS, brought_to, put_files
from page_image import FIT, PAUSE
from small_checkpoint import make_pipeline
from thumbnails import scenes
from workflow_maker.catalogue import Workflow, workflows
from workflow_thumbnails import Asked, Studio, asked_of, serving

RENDERERS = {"classic-nodes": False, "vue-nodes": True}
LANGUAGES = ("en", "zh")
LAYERED = "random-layered"
VIEW = {"width": 1700, "height": 950}
LONG = {"preset": "as set", "scheduler": "qwen_image", "steps": 1000}  # ends by being cancelled
# when two steps are done
CANCEL = """() => {
  const api = window.comfyAPI.api.api;
  const stop = ({ detail }) => {
    if (detail.stage !== 'sampling' || detail.step < 3) return;
    api.removeEventListener('qwen_lowvram.progress', stop);
    api.interrupt(null);
  };
  api.addEventListener('qwen_lowvram.progress', stop);
}"""
PRESS_R = "() => window.app.refreshComboInNodes()"  # for the images that have just come
PANEL = "() => document.querySelector('.qwen-lowvram-panel').firstChild.textContent"
IMAGES = "() => Object.values(window.app.nodeOutputs).flatMap(({ images }) => images ?? []).length"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pairs = [f"{renderer},{language}" for renderer, language in product(RENDERERS, LANGUAGES)]
    parser.add_argument("--in", dest="pairs", action="append", choices=pairs)
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("parts", nargs="*", help="of the names")
    options = parser.parse_args()
    wanted = [each for each in workflows() if not options.parts or any(part in each[0] for part in options.parts)]
    tools = find_page_tools(cache_folder(), venv_folder(cache_folder(), comfyui_version(require_comfyui())))
    if tools is None:
        raise SystemExit("There is no browser yet: python dev.py test finds or fetches one.")
    failed = 0
    with serving() as (server, client):
        put_files(server.base / "models")
        make_pipeline(server.base / "models" / "diffusers" / LAYERED, layered=True)
        for pair in options.pairs or pairs:
            with opened(tools, server.url, pair) as page:
                lines = [] if options.errors else runs(page, Studio(server, client), client.object_info(), pair, wanted)
                for line, right in chain(lines, errors(page, client.object_info(), pair)):
                    print(f"{pair}  {'  ' if right else '! '}{line}", flush=True)
                    failed += not right
    sys.exit(1 if failed else 0)


@contextmanager
def opened(tools: PageTools, url: str, pair: str) -> Iterator[Page]:
    renderer, language = pair.split(",")
    settings = {"Comfy.VueNodes.Enabled": RENDERERS[renderer], "Comfy.Locale": language, "Comfy.Minimap.Visible": False}
    page = Page(tools, url, settings, VIEW)
    try:
        page.open()
        yield page
    finally:
        page.close()


def runs(
    page: Page, studio: Studio, info: Any, pair: str, wanted: list[tuple[str, Workflow]]
) -> Iterator[tuple[str, bool]]:
    """A line for each workflow, and whether it went as it should."""
    for number, (stem, workflow) in enumerate(wanted):
        asked = asked_of(stem, workflow) or without_sense(workflow)
        try:
            yield ran(page, studio, info, f"{pair.replace(',', '-')}-{stem[:2]}", stem, asked, number)
        except Exception as error:  # the other workflows are still to be tried
            yield f"{stem}: {error!r:.500}", False


def without_sense(workflow: Workflow) -> Asked:
    """What no miniature has learned: to take an image apart, or to see three with 2.1."""
    if workflow.licence:
        return Asked(partial(shown, count=3), "miniature-2.1", {})
    return Asked(partial(shown, count=1), LAYERED, {"steps": 3})


def shown(chance: random.Random, *, count: int) -> scenes.Task:
    images = [np.asarray(scenes.drawn_layers(chance)[0]) for _ in range(count)]
    return scenes.Task("a circle and a square", lambda image: True, images, images)


def errors(page: Page, info: Any, pair: str) -> Iterator[tuple[str, bool]]:
    """A line for each error, and whether it came, and came in the page's language."""
    for name, wrong in WRONGS.items():
        try:
            told, shown, right = brought_to(page, info, name, wrong)
        except Exception as error:  # the others are still to be tried
            yield f"{name}: {error!r:.500}", False
            continue
        page.evaluate(FIT)
        page.evaluate(PAUSE, 500)
        page.screenshot(f"{pair.replace(',', '-')}-{name.replace(' ', '-')}")
        chinese = pair.endswith("en") or all(re.search("[一-鿿]", text) for text in shown)
        lines = [f"{name}: {told:.400}", *(text.replace("\n", " | ") for text in shown)]
        yield "\n    ".join(lines), right and chinese


def ran(page: Page, studio: Studio, info: Any, screenshot: str, stem: str, asked: Asked, seed: int) -> tuple[str, bool]:
    graph = studio.graph(stem, asked.draw(random.Random(stem)), asked, seed=seed)
    page.evaluate(PRESS_R)
    page.load(graph, stem)
    begun = time.monotonic()
    ended = page.run(300)["status"]
    seconds = time.monotonic() - begun
    page.evaluate(PAUSE, 1500)  # for the image to come
    images, done = page.evaluate(IMAGES), page.evaluate(PANEL)
    page.evaluate(FIT)
    page.evaluate(PAUSE, 500)
    page.screenshot(f"{screenshot}-done")
    page.load(set_widgets(graph, info, "QwenLowVRAMSample", **LONG), stem)
    page.evaluate(CANCEL)
    cancelled = page.run(300)["status"]
    page.evaluate(PAUSE, 300)
    told = page.evaluate(PANEL)
    page.screenshot(f"{screenshot}-cancelled")
    messages = page.unexpected_messages()
    page.forget_messages()
    line = f"{stem}: {ended} after {seconds:.0f} s, {images} images, {done!r}; {cancelled}, {told!r} {messages or ''}"
    return line, (ended, cancelled) == ("success", "interrupted") and images > 0 and not messages


if __name__ == "__main__":
    main()
