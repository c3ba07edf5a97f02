"""The job of measuring one case of ComfyUI's own model, with its dynamic VRAM where there is a GPU, in its own process.

Prepared as ComfyUI's main.py prepares it, in that order: its allocator, comfy-aimdo, then torch.
"""

import importlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from .cases import Case, Sizes


def do(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    dynamic = _prepared(job["comfyui"], job["device"])
    from . import native_step
    from .blocks import told

    case, sizes = Case(**job["case"]), Sizes.from_json(job["sizes"])
    row = told(lambda: native_step.measure(case, sizes, Path(job["folder"]), job["device"], job["seconds"]))
    yield row | {"dynamic_vram": dynamic}


@cache
def _prepared(folder: str, device: str) -> bool:
    """ComfyUI can be imported from now on; returns whether its dynamic VRAM is on."""
    sys.path.insert(0, folder)
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = device == "cpu"
    if args.cpu:
        return False
    importlib.import_module("cuda_malloc")
    control = importlib.import_module("comfy_aimdo.control")
    control.init()
    management = importlib.import_module("comfy.model_management")
    devices = [device.index for device in management.get_all_torch_devices()]
    try:
        on = control.init_devices((index, 0) for index in devices)
    except TypeError:  # before comfy-aimdo 0.4.10
        on = control.init_devices(iter(devices))
    if on:
        patcher: Any = importlib.import_module("comfy.model_patcher")
        patcher.CoreModelPatcher = patcher.ModelPatcherDynamic
        memory: Any = importlib.import_module("comfy.memory_management")
        memory.aimdo_enabled = True
    return bool(on)
