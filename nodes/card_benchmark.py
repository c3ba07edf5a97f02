"""Node: what this machine does with a model, or with one block of its size, as a line to paste and as JSON."""

import json
from typing import Any

import comfy.model_management
import comfyui_version
import torch

from ..engine.errors import Unsupported
from ..engine.out_of_memory import in_words
from ..engine.reports.card_report import CardReport
from ..engine.runs.card_benchmark import Bench, benchmark_card, benchmark_model
from ..engine.runs.machine_facts import machine_facts
from . import devices
from .adapters.around_runs import settle
from .adapters.in_comfyui import InComfyUI
from .adapters.limit_names import loader_limit
from .adapters.networks import served_model
from .adapters.patcher import LowVRAMPatcher
from .adapters.streamed_model import LowVRAMModel
from .adapters.value_checks import check_widgets
from .display_names import AUTO, BENCHMARK, CATEGORY, LOADER
from .dtypes import transformer_dtype


class QwenLowVRAMBenchmark:
    """Benchmark this card."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Measures this machine: the bus (PCIe), the disk, matrix products, one block of the model, and two steps of "
        "sampling beside their forecast. It gives a line to paste and all numbers as JSON, without file names or "
        "paths."
    )
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("line", "json")
    OUTPUT_TOOLTIPS = (
        "One line to paste: card, versions, format, size, seconds per step beside the forecast, memory and rates.",
        "All numbers as JSON. It names the card and the versions, but no files.",
    )
    SEARCH_ALIASES = ("benchmark", "speed", "measure", "seconds per step", "low vram", "card", "gpu")
    FUNCTION = "measure"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": 1328, "min": 16, "max": 16384, "step": 16}
        return {
            "required": {
                "width": ("INT", {**side, "tooltip": "Width of the image in pixels. On a CPU, choose a small one."}),
                "height": ("INT", {**side, "tooltip": "Height of the image in pixels. On a CPU, choose a small one."}),
            },
            "optional": {
                "model": (
                    "MODEL",
                    {
                        "tooltip": "The model to measure with, from Load Qwen-Image (low VRAM): its format, its "
                        "limits and the disk that its file is on. Without it, one block of random weights is "
                        "measured, but no disk."
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")  # what was measured is no input

    @in_words("the card was measured")
    def measure(self, width: int, height: int, model: Any = None) -> dict[str, Any]:
        given = {} if model is None else {"model": model}
        check_widgets(self.INPUT_TYPES(), width=width, height=height, **given)
        report = _of_card(width, height) if model is None else _of_model(model, width, height)
        numbers = json.dumps(report.as_dict(), indent=1)
        return {"ui": {"text": [report.line, "", numbers]}, "result": (report.line, numbers)}


def _of_model(model: Any, width: int, height: int) -> CardReport:
    inner: Any = getattr(model, "model", None)
    if not isinstance(inner, LowVRAMModel) or not isinstance(model, LowVRAMPatcher):
        raise Unsupported(
            "{node} works only with models from '{loader}'.\n\nWhat to do: connect a model from that node, or none to "
            "measure only the card.",
            code="benchmark.other_loader",
            node=BENCHMARK,
            loader=LOADER,
        )
    model.check_guests()
    settle(inner, model, model.model_options)
    transformer = inner.transformer
    bench = Bench(
        InComfyUI(model), loader_limit(inner.limit_bytes), inner.ram_limit_bytes, _machine(transformer.hardware.device)
    )
    images = served_model(model).family.from_prompts
    return benchmark_model(transformer, images, bench, width=width, height=height)


def _of_card(width: int, height: int) -> CardReport:
    hardware = devices.hardware_of(comfy.model_management.get_torch_device())
    bench = Bench(InComfyUI(), machine=_machine(hardware.device))
    return benchmark_card(
        hardware, lambda file: transformer_dtype(AUTO, file, hardware), bench, width=width, height=height
    )


def _machine(device: torch.device) -> dict[str, Any]:
    return {**machine_facts(device), "comfyui": comfyui_version.__version__}
