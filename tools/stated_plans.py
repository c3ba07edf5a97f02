"""The plans that notes, help and docs state: made by the planner at the real size, from a workflow's own settings.

    PYTHONPATH=tools/alias:tools python tools/stated_plans.py

prints them. `workflow_maker` writes them into the workflows' notes.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
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
from qwenimage_lowvram.engine.planning.cards import CARD_OF_GB, CARDS_GB, DataSheet, typical_limit_bytes
from qwenimage_lowvram.engine.planning.forecast import TYPICAL, Speeds
from qwenimage_lowvram.engine.planning.kept import KeptTiers
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.memory_plan import MemoryPlan
from qwenimage_lowvram.engine.planning.request import GIB, TOKEN_PX, Limits, SamplingRequest
from qwenimage_lowvram.engine.texts import size_text
from simulated_cards import CARDS, SimulatedCard

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
PROMPT_TOKENS = 512
GGUF_Q4_K_M = "GGUF Q5_K"  # a mixture with 5.1 bits a weight: planned with 5.5
LONGEST_IN_SECONDS = 120
HEADING = f"**What to expect** (planned for these settings and prompts of {PROMPT_TOKENS} tokens, not measured)\n\n"
CHINESE_HEADING = f"**预计**（按这些设置和 {PROMPT_TOKENS} 个词元的提示词计划，未实测）\n\n"
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SIDE_PX = 1024  # of an edited image, and of a megapixel as ComfyUI scales to it
# beside the cards that are simulated: those of the sizes that they leave out
MORE_CARDS = tuple(
    SimulatedCard(sheet, 3.5, ram_gib=24)
    for sheet in (
        DataSheet("RTX 3060 laptop", 6, 26.0, 336, 12),
        CARD_OF_GB[10],
        DataSheet("RTX 4070", 12, 58.3, 504, 24),
        DataSheet("RTX 4080", 16, 97.5, 717, 24),
    )
)
FREE_RAM_GIB = (8, 24)
MOST_TIMES = 2  # a graph's forecasts are those of cards with as much memory as it is for, up to so many times as much


def plan_of(
    graph: Mapping[str, Any], *, speeds: Speeds = TYPICAL, ram_bytes: int | None = None, **changed: Any
) -> MemoryPlan:
    """What the planner makes of a workflow's loader (with settings `changed`), LoRA, size, steps, guidance and images.

    ram_bytes: what is free where the loader sets no limit; None: as much as there are weights.
    """
    loader = widgets(graph, "QwenLowVRAMLoader") | changed
    limit = round(loader["ram_limit_gb"] * GIB) or ram_bytes
    footprint = _model(graph, loader).footprint
    return plan_memory(footprint, _request(graph, loader), Limits(round(loader["vram_limit_gb"] * GIB), limit), speeds)


def cards_of(card_gb: int) -> list[SimulatedCard]:
    """Those that a graph for cards of that size gives forecasts for, the slowest first."""
    known = (card for card in (*CARDS, *MORE_CARDS) if card_gb <= card.sheet.gb <= MOST_TIMES * card_gb)
    return sorted((card for card in known if card.dtype is torch.bfloat16), key=lambda card: card.sheet.tflops)


@dataclass(frozen=True)
class Stated:
    """A graph's plan, and its forecasts on cards of that size: as notes state them, in both languages."""

    card_gb: int
    plan: MemoryPlan
    cards: tuple[SimulatedCard, ...]
    first: str  # how long a run takes, as a person says it
    again: str  # with another seed

    @classmethod
    def of(cls, graph: Mapping[str, Any]) -> "Stated":
        gb = card_gb(graph)
        cards = cards_of(gb)
        runs = [plan_of(graph, speeds=card.speeds, ram_bytes=ram * GIB).run for card in cards for ram in FREE_RAM_GIB]
        first = duration_range(run.first_seconds for run in runs)
        again = duration_range(run.again_seconds for run in runs)
        return cls(gb, plan_of(graph), tuple(cards), first, again)

    def lines(self) -> list[str]:
        plan = self.plan
        request = plan.request
        megapixels = request.reference_tokens * TOKEN_PX**2 / 1e6
        shown = f", {megapixels:.1f} megapixels of images to edit" if megapixels else ""
        if request.frames > 1:
            shown = f", {request.frames - 1} layers and the image itself"
        guided = "with guidance" if request.branches > 1 else "no guidance: the negative prompt is not used"
        again = "about as long" if self.again == self.first else self.again
        return [
            f"- {request.width}x{request.height}{shown}, {request.timesteps} steps, {guided}.",
            f"- {_blocks_line(plan)}",
            *([f"- {_kept_line(plan.kept, shown=bool(megapixels))}"] if plan.kept.block_bytes else []),
            f"- Peak on the card: {size_text(plan.peak_bytes)} of the {size_text(plan.limit_bytes)} that "
            f"*vram_limit_gb* allows. The rest of the {self.card_gb} GB is left for the desktop, the driver and memory "
            "lost to fragmentation.",
            f"- {plan.run.steps} steps take {self.first}, with another seed {again}: forecasts from the data sheets of "
            f"{self.cards[0].name} to {self.cards[-1].name}, with {FREE_RAM_GIB[0]} to {FREE_RAM_GIB[-1]} GiB of RAM "
            "free. Nobody has measured this.",
        ]

    def chinese(self) -> list[str]:
        plan = self.plan
        request = plan.request
        megapixels = request.reference_tokens * TOKEN_PX**2 / 1e6
        shown = f"，编辑的图像共 {megapixels:.1f} 百万像素" if megapixels else ""
        if request.frames > 1:
            shown = f"，{request.frames - 1} 个图层和图像本身"
        guided = "有引导" if request.branches > 1 else "无引导：不使用负面提示词"
        blocks = f"模型的全部 {plan.blocks} 个块常驻显卡。"
        if plan.streamed:
            beside = "和保留的结果" if plan.kept.block_bytes else ""
            blocks = (
                f"模型的 {plan.blocks} 个块中 {len(plan.resident)} 个常驻显卡，其余 {plan.streamed} 个每步传入一次，"
                f"所有提示词共用（{size_text(plan.streamed_bytes_per_step)}）。它们在内存中能放多少就放多少（全部加上缓冲区{beside}"
                f"为 {size_text(plan.ram_peak_bytes)}；*内存上限*为 0 时使用空闲内存），放不下的每步从文件读取。"
            )
        return [
            f"- {request.width}x{request.height}{shown}，{request.timesteps} 步，{guided}。",
            f"- {blocks}",
            *([f"- {_kept_in_chinese(plan.kept, shown=bool(megapixels))}。"] if plan.kept.block_bytes else []),
            f"- 显存峰值 {size_text(plan.peak_bytes)}，*显存上限*为 {size_text(plan.limit_bytes)}；{self.card_gb} GB 中"
            "其余的留给桌面、驱动和显存碎片。",
            f"- {plan.run.steps} 步用时 {_in_chinese(self.first)}，换种子 {_in_chinese(self.again)}：根据 "
            f"{self.cards[0].name} 到 {self.cards[-1].name} 的规格预测，空闲内存 {FREE_RAM_GIB[0]} 到 "
            f"{FREE_RAM_GIB[-1]} GiB，无人实测。",
        ]


def card_gb(graph: Mapping[str, Any]) -> int:
    """The card that a workflow is for, by the limit in its loader."""
    limit = round(widgets(graph, "QwenLowVRAMLoader")["vram_limit_gb"] * GIB)
    return min(CARDS_GB, key=lambda gb: abs(typical_limit_bytes(gb) - limit))


def _blocks_line(plan: MemoryPlan) -> str:
    if not plan.streamed:
        return f"All {plan.blocks} blocks of the model stay on the card."
    beside = ", the buffers and what is kept" if plan.kept.block_bytes else " and the buffers"
    return (
        f"{len(plan.resident)} of {plan.blocks} blocks of the model stay on the card. The other {plan.streamed} "
        f"({size_text(plan.streamed_bytes_per_step)}) pass through it once per step, for all prompts together. RAM "
        f"holds as many of them as there is room for (all of them{beside} need "
        f"{size_text(plan.ram_peak_bytes)}; *ram_limit_gb* 0 uses what is free); the others are read from the file at "
        "every step."
    )


def _places(kept: KeptTiers, names: tuple[str, str], of_some: str) -> list[str]:
    """Where it is kept; `of_some` says it of some blocks alone."""
    counts = zip((kept.on_device, kept.in_host), names, strict=True)
    return [
        of_some.format(count=count, blocks=kept.blocks, where=where) if count < kept.blocks else where
        for count, where in counts
        if count
    ]


def _kept_line(kept: KeptTiers, *, shown: bool) -> str:
    """What blocks make once, for how many of them it is kept where. shown: of images, too."""
    size = size_text(kept.kept_bytes)
    made = "the prompt and the images" if shown else "the prompt"
    places = _places(kept, ("on the card", "in RAM"), "{count} of {blocks} blocks {where}")
    again = f"; {kept.remade} blocks make it again at every step" if kept.remade else ""
    comma = "," if len(places) > 1 or kept.remade else ""
    return f"What the model makes of {made} is computed once and kept: {size}{comma} {' and '.join(places)}{again}."


def _in_chinese(durations: str) -> str:
    """A `duration_range`."""
    said = durations.replace("about ", "约 ").replace(" to ", " 到 ").replace(" minutes", " 分钟")
    return re.sub(r" s\b", " 秒", said).replace("秒 到", "秒到")


def _kept_in_chinese(kept: KeptTiers, *, shown: bool) -> str:
    """As `_kept_line` says it."""
    size = size_text(kept.kept_bytes)
    made = "提示词和图像" if shown else "提示词"
    places = _places(kept, ("在显卡上", "在内存中"), "{blocks} 块中 {count} 块的{where}")
    again = f"；{kept.remade} 块每步重新计算" if kept.remade else ""
    return f"模型由{made}得到的结果只计算一次并保留：{size}，{'，'.join(places)}{again}"


def duration_range(seconds: Iterable[float]) -> str:
    """The shortest and the longest of durations, as a person says them: 40 to 90 s, 2 to 11 minutes."""
    found = sorted(seconds)
    least, most = found[0], found[-1]
    if most < LONGEST_IN_SECONDS:
        return _range(_rounded(least), _rounded(most), "s")
    if least < LONGEST_IN_SECONDS / 2:
        return f"{_rounded(least)} s to {_minutes(most)} minutes"
    return _range(_minutes(least), _minutes(most), "minutes")


def _range(least: int, most: int, unit: str) -> str:
    return f"{least} to {most} {unit}" if most > least else f"about {most} {unit}"


def _minutes(seconds: float) -> int:
    return max(1, round(seconds / 60))


def _rounded(seconds: float) -> int:
    """To 5 s, short ones to 1."""
    return max(1, round(seconds)) if seconds < 20 else 5 * round(seconds / 5)


def all_nodes(graph: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The graph's nodes, and those inside its subgraphs."""
    yield from graph["nodes"]
    for subgraph in (graph.get("definitions") or {}).get("subgraphs", ()):
        yield from subgraph["nodes"]


def note_of(graph: Mapping[str, Any]) -> dict[str, Any]:
    return next(node for node in graph["nodes"] if node["type"] == "MarkdownNote")


def _request(graph: Mapping[str, Any], loader: Mapping[str, Any]) -> SamplingRequest:
    sample = widgets(graph, "QwenLowVRAMSample")
    types = [node["type"] for node in all_nodes(graph)]
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
    return replace(request, frames=layers + 1, reference_tokens=request.frame_tokens) if layers else request


def _model(graph: Mapping[str, Any], loader: Mapping[str, Any]) -> TransformerParts:
    weight_format = _weight_format(loader["transformer"], loader["weight_format"])
    types = {node["type"] for node in all_nodes(graph)}
    return _parts(
        _family(loader["transformer"]),
        weight_format,
        lora="QwenLowVRAMLoadLora" in types,
        layered="EmptyQwenImageLayeredLatentImage" in types,
    )


def _family(transformer: str) -> Family:
    """By the file's name: sizes are all that a plan takes of a file, and no file is there."""
    return QWEN_IMAGE_21 if "2.1" in transformer else QWEN_IMAGE


def _weight_format(transformer: str, chosen: str) -> str:
    """As the file is stored, by its name, unless another one was chosen."""
    if chosen not in ("auto", "as stored"):
        return chosen
    known = {"int8_convrot": "int8_convrot", "fp8": "fp8", "Q4_K_M": GGUF_Q4_K_M}
    return next((stored for name, stored in known.items() if name in transformer), "bf16")


def _size(graph: Mapping[str, Any]) -> tuple[int, int, int]:
    """Width and height of the output, and layers: an empty latent's, a square one of a scaled or an edited image."""
    by_type: dict[str, Any] = {node["type"]: node.get("widgets_values") for node in all_nodes(graph)}
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


def widgets(graph: Mapping[str, Any], class_type: str) -> dict[str, Any]:
    """Values by name. A seed has one more, what happens to it after a run."""
    inputs = json.loads((ROOT / "tests" / "data" / "object_info.json").read_text())[class_type]["inputs"]
    node = next(node for node in graph["nodes"] if node["type"] == class_type)
    names = [entry["name"] for entry in inputs if entry["type"] in WIDGET_TYPES]
    if "seed" in names:
        names.insert(names.index("seed") + 1, "after the run")
    return dict(zip(names, node["widgets_values"], strict=True))


def main() -> None:
    for file in WORKFLOWS:
        graph = json.loads(file.read_text(encoding="utf-8"))
        print(file.stem, *Stated.of(graph).lines(), plan_of(graph), sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
