"""The plans that notes, help and docs state: made by the planner at the real size, from a workflow's own settings.

    PYTHONPATH=tools/alias:tools python tools/stated_plans.py [--write]

prints them, or writes them into the notes of the workflows.
"""

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import full_size
import torch
from full_size_21 import transformer_21_checkpoint
from full_size_formats import in_format
from qwenimage_lowvram.engine.lora.lora_file import match
from qwenimage_lowvram.engine.lora.weight_patches import lora_patches
from qwenimage_lowvram.engine.models.families import QWEN_IMAGE, QWEN_IMAGE_21
from qwenimage_lowvram.engine.models.family import Family
from qwenimage_lowvram.engine.models.qwen_image_21.sizes import plan_sizes_21
from qwenimage_lowvram.engine.models.transformer_parts import TransformerParts
from qwenimage_lowvram.engine.planning.forecast import TYPICAL, Bound
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.memory_plan import MemoryPlan
from qwenimage_lowvram.engine.planning.request import GIB, TOKEN_PX, Limits, SamplingRequest
from qwenimage_lowvram.engine.texts import size_text

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
PROMPT_TOKENS = 512
HEADING = f"**What to expect** (planned for these settings and prompts of {PROMPT_TOKENS} tokens, not measured)\n\n"
SPEEDS_TEXT = (
    f"On a card of {TYPICAL.flops / 1e12:g} TFLOP/s, with {TYPICAL.bus_bytes / 1e9:g} GB/s on the bus and "
    f"{TYPICAL.disk_bytes / 1e9:g} GB/s from the disk"
)
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SIDE_PX = 1024  # of an edited image, and of a megapixel as ComfyUI scales to it


def plan_of(graph: Mapping[str, Any], **changed: Any) -> MemoryPlan:
    """What the planner makes of a workflow's loader (with settings `changed`), LoRA, size, steps, guidance and
    images."""
    loader = _widgets(graph, "QwenLowVRAMLoader") | changed
    sample = _widgets(graph, "QwenLowVRAMSample")
    types = [node["type"] for node in graph["nodes"]]
    family = _family(loader["transformer"])
    width, height, layers = _size(graph)
    references = types.count("LoadImage") if "QwenLowVRAMEncodeEditPrompt" in types else 0
    request = SamplingRequest(
        width,
        height,
        branches=2 if sample["cfg"] > 1 else 1,
        prompt_tokens=PROMPT_TOKENS + references * family.prompts.seen,
        reference_tokens=references * family.prompts.reference,
        timesteps=sample["steps"],
    )
    if references and family is QWEN_IMAGE_21:
        sizes = plan_sizes_21([(width, height)] * references)  # as Encode Edit Prompt makes them of square images
        (width, height), shown = sizes.output, sum(w * h for w, h in sizes.references)
        request = replace(request, width=width, height=height, reference_tokens=shown // TOKEN_PX**2)
    if layers:
        request = replace(request, frames=layers + 1, reference_tokens=request.frame_tokens)
    weight_format = _weight_format(loader["transformer"], loader["weight_format"])
    parts = _parts(family, weight_format, lora="QwenLowVRAMLoadLora" in types, layered=layers > 0)
    limits = Limits(round(loader["vram_limit_gb"] * GIB), round(loader["ram_limit_gb"] * GIB))
    return plan_memory(parts.footprint, request, limits)


def lines(plan: MemoryPlan) -> list[str]:
    """The plan as notes state it."""
    request, bound = plan.request, {Bound.COMPUTE: "computing"}.get(plan.forecast.bound, plan.forecast.bound.value)
    megapixels = request.reference_tokens * TOKEN_PX**2 / 1e6
    shown = f", {megapixels:.1f} megapixels to change" if megapixels else ""
    if request.frames > 1:
        shown = f", {request.frames - 1} layers and the image itself"
    guided = "guided" if request.branches > 1 else "no guidance: the negative prompt is not used"
    stay = [f"{len(plan.resident)} stay on the card", f"{len(plan.held)} in RAM"]
    stay += [f"{plan.from_file} are read from the file"] * (plan.from_file > 0)
    kept = str(plan.kept)
    blocks = (
        f"Of {plan.blocks} blocks {', '.join(stay)}. {plan.streamed} pass through the card once per step, for all "
        f"prompts together: {size_text(plan.streamed_bytes_per_step)}."
    )
    return [
        f"- {request.width}x{request.height}{shown}, {request.timesteps} steps, {guided}.",
        f"- {blocks if plan.streamed else f'All {plan.blocks} blocks stay on the card.'}",
        *([f"- Computed once: {kept}."] if kept else []),
        f"- Peak on the card: {size_text(plan.peak_bytes)} of {size_text(plan.limit_bytes)} (*vram_limit_gb*), which "
        f"leaves the rest to the desktop. RAM for blocks and buffers: {size_text(plan.ram_peak_bytes)} of "
        f"{size_text(plan.limits.ram_bytes or 0)} (*ram_limit_gb*).",
        f"- {SPEEDS_TEXT}: about {plan.forecast.seconds:.1f} s per step, bound by {bound}; {plan.run}.",
    ]


def stated(note: str, plan: MemoryPlan) -> str:
    """The note with what to expect of the plan."""
    return re.sub(
        r"\*\*What to expect\*\*[^\n]*\n\n(- [^\n]*\n)+", lambda _: HEADING + "\n".join(lines(plan)) + "\n", note
    )


def note_of(graph: Mapping[str, Any]) -> dict[str, Any]:
    return next(node for node in graph["nodes"] if node["type"] == "MarkdownNote")


def _family(transformer: str) -> Family:
    """By the file's name: sizes are all that a plan takes of a file, and no file is there."""
    return QWEN_IMAGE_21 if "2.1" in transformer else QWEN_IMAGE


def _weight_format(transformer: str, chosen: str) -> str:
    """As the file is stored, by its name, unless another one was chosen."""
    if chosen not in ("auto", "as stored"):
        return chosen
    return next((known for known in ("int8_convrot", "fp8") if known in transformer), "bf16")


def _size(graph: Mapping[str, Any]) -> tuple[int, int, int]:
    """Width and height of the output, and layers: an empty latent's, a square one of a scaled or an edited image."""
    by_type = {node["type"]: node.get("widgets_values") for node in graph["nodes"]}
    if "EmptyQwenImageLayeredLatentImage" in by_type:
        width, height, layers, _ = by_type["EmptyQwenImageLayeredLatentImage"]
        return width, height, layers
    for empty in ("EmptySD3LatentImage", "EmptyLatentImage"):
        if empty in by_type:
            width, height, _ = by_type[empty]
            return width, height, 0
    _, megapixels, step = by_type.get("ImageScaleToTotalPixels", ("", 1.0, 1))
    side = round(megapixels**0.5 * SIDE_PX / step) * step
    return side, side, 0


@cache
def _parts(family: Family, weight_format: str, *, lora: bool, layered: bool) -> TransformerParts:
    """A model file's sizes: fp8 as stored, or bf16 in that format; perhaps with Lightning's LoRA."""
    stored = torch.float8_e4m3fn if weight_format == "fp8" else torch.bfloat16
    if family is QWEN_IMAGE_21:
        source = transformer_21_checkpoint(stored)
    else:
        source = full_size.transformer_checkpoint(stored, layered=layered)
    if weight_format != "fp8":
        source = in_format(source, weight_format)
    parts = family.parts(source, dtype=torch.bfloat16, hardware=full_size.fake_gpu(), source=full_size.EmptySource)
    if lora:
        parts.patch(lora_patches([(match(full_size.lightning_lora(parts.weights), parts.weights), 1.0)]))
    return parts


def _widgets(graph: Mapping[str, Any], class_type: str) -> dict[str, Any]:
    """Values by name. A seed has one more, what happens to it after a run."""
    inputs = json.loads((ROOT / "tests" / "data" / "object_info.json").read_text())[class_type]["inputs"]
    node = next(node for node in graph["nodes"] if node["type"] == class_type)
    names = [entry["name"] for entry in inputs if entry["type"] in WIDGET_TYPES]
    if "seed" in names:
        names.insert(names.index("seed") + 1, "after the run")
    return dict(zip(names, node["widgets_values"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into the notes of the workflows")
    arguments = parser.parse_args()
    for file in WORKFLOWS:
        graph = json.loads(file.read_text())
        plan, note = plan_of(graph), note_of(graph)
        print(file.stem, *lines(plan), plan, sep="\n", end="\n\n")
        if arguments.write:
            note["widgets_values"][0] = stated(note["widgets_values"][0], plan)
            file.write_text(json.dumps(graph, ensure_ascii=False, indent=2) + "\n")


if __name__ == "__main__":
    main()
