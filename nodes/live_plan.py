"""What a graph's next run would take, said while a person still sets it up: a line for its loader and its sampler.

The planner alone answers, from the files' headers; nothing is loaded, and nothing of the graph runs.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import comfy.model_management
import folder_paths
import torch
from PIL import Image

from ..engine.compute.linear_choice import Computing
from ..engine.compute.step_schedules import OFF, step_cache_of
from ..engine.errors import DoesNotFit, InvalidRequest, QwenLowVRAMError, WrongModel
from ..engine.lora.lora_file import LoraFile, needs_adapters, open_lora
from ..engine.planning.stages import ImagePlan, ImageRequest
from ..engine.reports.plan_facts import plan_facts
from ..engine.texts import size_text
from ..engine.told import Told
from .adapters.control_sizes import controls_of_files
from .adapters.known_speeds import speeds_stamp
from .adapters.limits import could_be_free
from .adapters.progress import executing_node_id
from .adapters.value_checks import check_widgets, limit_bytes
from .devices import device_of, others_of
from .display_names import AUTO
from .graph_runs import GraphRun, Prompt, Size, runs_of
from .inputs import at_input
from .loader_inputs import loader_inputs
from .lora import lora_file
from .misplaced_models import doubt_of, require_placed
from .model_choices import plain_file
from .planned_models import PlannedModels, PlanSettings
from .sources import Sources

SIZE = (1328, 1328)  # where nothing tells: the model's own
# of the loader
_FILES = ("transformer", "text_encoder", "vae")
_PLANNED_BY = (
    "dtype", "weight_format", "vram_limit_gb", "ram_limit_gb", "variant", "step_cache", "compute", "compile",
    "attention", "transformer_device",
)  # fmt: skip
_one_at_a_time = Lock()  # a page that types quickly shall not fill the threads


@dataclass(frozen=True)
class PlanLine:
    """For the nodes of `nodes`, by their ids. fits: False where the run would be refused, or a file is wrong.

    text: English, for programs and refusals. values: what a page says it with, in another language: facts
    of the plan; of an error its code and values.
    """

    nodes: tuple[str, ...]
    fits: bool
    text: str
    values: dict[str, Any]


def lines_of(prompt: Prompt) -> list[PlanLine]:
    """One for each sampler that our loaders' models reach, where the graph names its files. Reads headers; not for the
    server's event loop."""
    with _one_at_a_time:
        return [line_of(run) for run in runs_of(prompt, image_size) if all(run.settings.get(name) for name in _FILES)]


def line_of(run: GraphRun) -> PlanLine:
    """By the limits that a person set, or by what could be free."""
    nodes = (run.loader, run.sampler)
    try:
        loras = _loras_of(run)
        models = _models_of(run, loras)
        require_placed(run, models.family, models.member)
        request = _request_of(run, models)
        nets = [plain_file("controlnet", name) for name in run.controlnets]
        patches = [plain_file("model_patches", name) for name in run.patches]
        read = [*filter(_has_header, nets)], [*filter(_has_header, patches)]
        controls = controls_of_files(*read, request.sampling, models.any_footprint, run.batch)
        request = replace(request, controls=controls)
        free_vram, free_ram = could_be_free(_device(run))
        limit = _limit(run, "vram_limit_gb")
        vram_bytes, ram_bytes = limit or free_vram, _limit(run, "ram_limit_gb") or free_ram
        others = [(device, limit or could_be_free(device)[0]) for device in _others(run)]
        card = models.card(request, "", vram_bytes, vram_bytes, ram_bytes, others)
    except QwenLowVRAMError as error:
        return PlanLine(nodes, False, str(error), error.as_dict())
    if card.plan is None:
        return PlanLine(nodes, False, card.refusal, card.error.as_dict() if card.error else {})
    values = plan_facts(card.plan.sampling, host=False) | {
        "peak_bytes": card.plan.peak_bytes,  # of all stages
        "format": models.held_in(card.weight_format),
        "measured": models.measured,
        "size_known": run.size is not None,
        "doubts": [told.as_dict() for told in _doubts(run, models, vram_bytes, ram_bytes)],
        "uncounted": [
            name
            for name, seen in (
                ("LoRA", any(map(needs_adapters, loras))),
                ("ControlNet", not all(map(_has_header, nets))),
                ("model patch", not all(map(_has_header, patches))),
            )
            if seen or name in run.uncounted
        ],
    }
    return PlanLine(nodes, True, _sentence(card.plan, values), values)


def refusal_of(run: GraphRun) -> QwenLowVRAMError | None:
    """Why the run cannot end well, whatever its prompts' lengths and whatever is free; None where it may.

    Models that do not belong where they are refuse; of memory, only a VRAM limit that a person set and a size that the
    graph tells to the pixel: both hold when it runs.
    """
    try:
        models = _models_of(run, _loras_of(run))
    except QwenLowVRAMError:
        return None  # who runs into it says it
    try:
        require_placed(run, models.family, models.member)
    except (InvalidRequest, WrongModel) as error:
        return error
    limit = _limit(run, "vram_limit_gb")
    if limit is None or not run.exact or run.images:  # whose sizes count, too
        return None
    try:
        request = _request_of(replace(run, prompt_tokens=1), models)
        others = [(device, limit) for device in _others(run)]
        return models.card(request, "", limit, limit, _limit(run, "ram_limit_gb"), others).error
    except QwenLowVRAMError:
        return None


def refuse_what_cannot_run(prompt: Prompt | None) -> None:
    """Raise in the node that runs, before it reads anything, where no sampler behind it could run: DoesNotFit,
    WrongModel, or InvalidRequest."""
    node = executing_node_id()
    if prompt is None or node is None:
        return
    refusals = [refusal_of(run) for run in runs_of(prompt, image_size) if node in run.prompts]
    first = refusals[0] if refusals else None
    if first is None or None in refusals:
        return
    if not isinstance(first, DoesNotFit):
        raise first
    raise DoesNotFit(
        "This graph's image will not fit, so its prompt is not encoded. {reason}",
        code="graph.will_not_fit",
        reason=first,
    )


def _models_of(run: GraphRun, loras: Sequence[LoraFile]) -> PlannedModels:
    """Raises what the loader raises."""
    given = {name: run.settings[name] for name in _PLANNED_BY if run.settings.get(name) is not None}
    check_widgets(loader_inputs(), **given)
    sources = Sources.of(*(str(run.settings.get(name)) for name in _FILES))
    settings = PlanSettings(
        given.get("weight_format", AUTO),
        given.get("dtype", AUTO),
        Computing(given.get("compute", Computing.AS_COMFYUI.value)),
        given.get("compile", False),
        given.get("variant", AUTO),
        given.get("attention", AUTO),
        given.get("transformer_device", AUTO),
    )
    counted = tuple(file.path for file in loras if not needs_adapters(file))
    stamps = (*_stamps(sources.transformer, sources.text_encoder, sources.vae, *counted), speeds_stamp())
    return _opened(sources, settings, run.layers, run.images, counted, stamps)


def _loras_of(run: GraphRun) -> list[LoraFile]:
    """Raises what Load LoRA raises."""
    with at_input("lora_name"):
        return [lora_file(name) for name in run.loras]


def _doubts(run: GraphRun, models: PlannedModels, vram_bytes: int, ram_bytes: int) -> Iterator[Told]:
    """What is worth knowing although it runs."""
    doubt = doubt_of(run, models.member)
    if doubt is not None:
        yield doubt
    faster = models.faster_format(vram_bytes, ram_bytes)
    if faster:
        yield Told("A faster format: {advice}", code="told.faster_format", advice=faster)


def _has_header(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def _device_choice(run: GraphRun) -> str:
    return run.settings.get("transformer_device") or AUTO


def _device(run: GraphRun) -> torch.device:
    """That the loader's blocks are computed on, by a choice that has been checked."""
    return device_of(_device_choice(run), comfy.model_management.get_torch_device())


def _others(run: GraphRun) -> list[torch.device]:
    """The further cards of the loader's device."""
    return others_of(_device_choice(run), _device(run))


def _limit(run: GraphRun, name: str) -> int | None:
    """In bytes, of a value that has been checked; None where a person set none."""
    return limit_bytes(run.settings.get(name) or 0.0)


@lru_cache(maxsize=8)
def _opened(
    sources: Sources, settings: PlanSettings, layers: int, images: int, loras: tuple[Path, ...], key: object
) -> PlannedModels:
    del key  # says when to look again
    return PlannedModels.open(sources, settings, layers, images, [open_lora(path) for path in loras])


def _request_of(run: GraphRun, models: PlannedModels) -> ImageRequest:
    """Raises InvalidRequest for steps that the step cache knows nothing of."""
    width, height = run.size or SIZE
    cache = step_cache_of(run.settings.get("step_cache") or OFF)
    if cache is not None:
        cache.require_steps(run.steps)
    return ImageRequest(
        width,
        height,
        run.batch,
        run.guided,
        run.steps,
        run.prompt_tokens,
        references=run.images,
        layers=run.layers,
        step_cache=cache,
        prompts=models.prompts,
    )


def _sentence(plan: ImagePlan, values: Mapping[str, Any]) -> str:
    blocks = f"{values['format']}, {values['resident']} of {values['blocks']} blocks on the card"
    memory = f"{size_text(values['peak_bytes'])} of {size_text(values['limit_bytes'])}"
    machine = "on this machine" if values["measured"] else "on a typical card"
    if values["further"]:
        machine += f" with {len(values['further']) + 1} cards"
    parts = [f"{blocks}, {memory}, about {plan.sampling.forecast} {machine}"]
    if values["uncounted"]:
        parts.append(f"{', '.join(values['uncounted'])} not counted")
    if not values["size_known"]:
        parts.append(f"for {values['width']}x{values['height']}, as the size is not known yet")
    return "\n".join(["; ".join(parts), *(doubt["text"] for doubt in values["doubts"])])


def _stamps(*paths: Path) -> tuple[tuple[str, int], ...]:
    """Paths, and when they were last changed."""
    return tuple((str(path), _changed_ns(path)) for path in paths)


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
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
