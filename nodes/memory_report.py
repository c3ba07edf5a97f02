"""Node: what the stages of an image really took, beside what was planned."""

import json
import platform
from typing import Any

import comfy.model_management
import comfyui_version
import torch

from ..engine.errors import InvalidRequest, Unsupported
from ..engine.reports.charts import draw_timeline
from ..engine.reports.image_report import ImageReport
from ..engine.told import json_of
from .adapters.streamed_model import LowVRAMModel
from .display_names import CATEGORY, LOADER
from .previews import as_image, preview

JSON_VERSION = 1


class QwenLowVRAMMemoryReport:
    """Memory Report."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows what encoding, sampling and decoding took, beside what was planned: peaks, bytes moved, seconds spent "
        "waiting for the disk and the bus (PCIe), and memory over time."
    )
    RETURN_TYPES = ("STRING", "IMAGE", "STRING")
    RETURN_NAMES = ("report", "timeline", "json")
    OUTPUT_TOOLTIPS = (
        "The report as text.",
        "Memory over time, with the stages and the limits.",
        "All numbers as JSON, for bug reports. It names the card and the versions, but no files.",
    )
    SEARCH_ALIASES = ("vram", "memory", "report", "profile", "benchmark", "low vram")
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that was sampled with, from Load Qwen-Image (low VRAM)."}),
            },
            "optional": {
                "after": (
                    "*",
                    {
                        "tooltip": "What to wait for: connect the image from Decode (tiled), so that decoding is "
                        "included in the report."
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")  # what was measured is no input

    def report(self, model: Any, after: Any = None) -> dict[str, Any]:
        inner: Any = getattr(model, "model", None)
        if not isinstance(inner, LowVRAMModel):
            raise Unsupported(
                "Memory Report works only with models from '{loader}'.\n\nWhat to do: connect a model from that node.",
                code="graph.report_of_another_loader",
                loader=LOADER,
            )
        if not inner.timeline.reports:
            raise InvalidRequest(
                "No stage of this model has run yet.\n\nWhat to do: connect the image from Decode (tiled) to 'after', "
                "so that the report waits for it.",
                code="report.no_stage_yet",
            )
        report = ImageReport(inner.timeline.reports, inner.last_report, _machine(inner.transformer.hardware.device))
        text = str(report)
        numbers = json.dumps({"version": JSON_VERSION, **report.as_dict(), "text": text}, indent=1)
        image = draw_timeline(_title(report), report, inner.timeline.samples)
        ui = {"images": preview(image), "text": [text], "parts": json_of(report.parts())}
        return {"ui": ui, "result": (text, as_image(image), numbers)}


def _title(report: ImageReport) -> str:
    return "Memory report" if report.sampling is None else f"Memory report: {report.sampling.plan.request}"


def _machine(device: torch.device) -> dict[str, str]:
    return {
        "device": comfy.model_management.get_torch_device_name(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "comfyui": comfyui_version.__version__,
    }
