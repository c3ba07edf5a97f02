"""What a graph's next run would take, said while a person still sets it up: a line for its loader and its sampler.

The planner alone answers, from the files' headers; nothing is loaded, and nothing of the graph runs.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import comfy.model_management
import folder_paths
from PIL import Image

from ..engine.compute.linear_choice import Computing
from ..engine.compute.step_schedules import OFF, step_cache_of
from ..engine.errors import DoesNotFit, QwenLowVRAMError
from ..engine.planning.stages import ImageRequest
from ..engine.texts import size_text
from .adapters.known_speeds import speeds_stamp
from .adapters.limits import could_be_free
from .adapters.progress import executing_node_id
from .adapters.value_checks import check_widgets, limit_bytes
from .display_names import AUTO
from .graph_runs import GraphRun, Prompt, Size, runs_of
from .loader_inputs import loader_inputs
from .planned_models import PlannedModels, PlanSettings
from .sources import Sources

SIZE = (1328, 1328)  # where nothing tells: the model's own
# of the loader
_PLANNED_BY = ("dtype", "weight_format", "vram_limit_gb", "ram_limit_gb", "step_cache", "compute", "compile")
_one_at_a_time = Lock()  # a page that types quickly shall not fill the threads


@dataclass(frozen=True)
class PlanLine:
    """For the nodes of `nodes`, by their ids. fits: False where the run would be refused, or a file is wrong.

    text: one English sentence. values: its numbers and names, for another language; of a refusal, its code and values.
    """

    nodes: tuple[str, ...]
    fits: bool
    text: str
    values: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"nodes": list(self.nodes), "fits": self.fits, "text": self.text, "values": self.values}


def lines_of(prompt: Prompt) -> list[PlanLine]:
    """One for each sampler that our loaders' models reach. Reads headers; not for the server's event loop."""
    with _one_at_a_time:
        return [line_of(run) for run in runs_of(prompt, image_size)]


def line_of(run: GraphRun) -> PlanLine:
    """By the limits that a person set, or by what could be free."""
    nodes = (run.loader, run.sampler)
    free_vram, free_ram = could_be_free(comfy.model_management.get_torch_device())
    vram_bytes, ram_bytes = (
        limit_bytes(run.settings.get(name) or 0.0) or free
        for name, free in (("vram_limit_gb", free_vram), ("ram_limit_gb", free_ram))
    )
    try:
        models = _models_of(run)
        request = _request_of(run, models)
        card = models.card(request, "", vram_bytes, vram_bytes, ram_bytes)
    except QwenLowVRAMError as error:
        return PlanLine(nodes, False, str(error), error.as_dict())
    if card.plan is None:
        return PlanLine(nodes, False, card.refusal, {})
    plan = card.plan.sampling
    values = {
        "format": models.held_in(card.weight_format),
        "resident": len(plan.resident),
        "blocks": plan.blocks,
        "peak_bytes": card.plan.peak_bytes,
        "limit_bytes": vram_bytes,
        "seconds": plan.forecast.seconds,
        "measured": models.measured,
        "bound": plan.forecast.bound.value,
        "width": request.width,
        "height": request.height,
        "size_known": run.size is not None,
        "uncounted": [*run.uncounted, *(["LoRA"] if run.loras else [])],
    }
    return PlanLine(nodes, True, _sentence(values), values)


def refusal_of(run: GraphRun) -> str:
    """Why the run cannot fit, whatever its prompts' lengths and whatever is free; empty where it may.

    Only a VRAM limit that a person set and a size that the graph tells to the pixel refuse: both hold when it runs.
    """
    limit = limit_bytes(run.settings.get("vram_limit_gb") or 0.0)
    if limit is None or not run.exact:
        return ""
    try:
        models = _models_of(run)
        request = _request_of(replace(run, prompt_tokens=1), models)
        return models.card(request, "", limit, limit, limit_bytes(run.settings.get("ram_limit_gb") or 0.0)).refusal
    except QwenLowVRAMError:
        return ""  # who runs into it says it


def refuse_what_cannot_fit(prompt: Prompt | None) -> None:
    """Raise DoesNotFit in the node that runs, before it reads anything, where no sampler behind it could run."""
    node = executing_node_id()
    if prompt is None or node is None:
        return
    refusals = [refusal_of(run) for run in runs_of(prompt, image_size) if node in run.prompts]
    if refusals and all(refusals):
        raise DoesNotFit(
            "This graph's image will not fit, so that nothing is encoded for it. {reason}",
            code="graph.will_not_fit",
            reason=refusals[0],
        )


def _models_of(run: GraphRun) -> PlannedModels:
    """Raises what the loader raises."""
    check_widgets(loader_inputs(), **{name: run.settings[name] for name in _PLANNED_BY if name in run.settings})
    sources = Sources.of(*(str(run.settings.get(name)) for name in ("transformer", "text_encoder", "vae")))
    settings = PlanSettings(
        run.settings.get("weight_format", AUTO),
        run.settings.get("dtype", AUTO),
        Computing(run.settings.get("compute", Computing.AS_COMFYUI.value)),
        run.settings.get("compile", False),
    )
    return _opened(sources, settings, run.layers, run.images, (_stamps(sources), speeds_stamp()))


@lru_cache(maxsize=8)
def _opened(sources: Sources, settings: PlanSettings, layers: int, images: int, key: object) -> PlannedModels:
    del key  # says when to look again
    return PlannedModels.open(sources, settings, layers, images)


def _request_of(run: GraphRun, models: PlannedModels) -> ImageRequest:
    width, height = run.size or SIZE
    return ImageRequest(
        width,
        height,
        run.batch,
        run.guided,
        run.steps,
        run.prompt_tokens,
        references=run.images,
        layers=run.layers,
        step_cache=step_cache_of(run.settings.get("step_cache", OFF)),
        prompts=models.prompts,
    )


def _sentence(values: Mapping[str, Any]) -> str:
    machine = "on this machine" if values["measured"] else "on a typical card"
    uncounted = f"; {', '.join(values['uncounted'])} not counted" if values["uncounted"] else ""
    unknown = (
        "" if values["size_known"] else f"; for {values['width']}x{values['height']}, as the size is not known yet"
    )
    memory = f"{size_text(values['peak_bytes'])} of {size_text(values['limit_bytes'])}"
    return (
        f"{values['format']}, {values['resident']} of {values['blocks']} blocks on the card, {memory}, about "
        f"{values['seconds']:.2g} s/step {machine}, limited by {values['bound']}{uncounted}{unknown}"
    )


def _stamps(sources: Sources) -> tuple[tuple[str, int], ...]:
    """Paths, and when they were last changed."""
    return tuple((str(path), _changed_ns(path)) for path in (sources.transformer, sources.text_encoder, sources.vae))


def _changed_ns(path: Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def image_size(name: str) -> Size | None:
    """Of an image in ComfyUI's input folder, as LoadImage names it: from its header. None where it is none."""
    try:
        if not folder_paths.exists_annotated_filepath(name):
            return None
        with Image.open(folder_paths.get_annotated_filepath(name)) as image:
            return image.size
    except (OSError, ValueError):
        return None
