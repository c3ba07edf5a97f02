"""Where ComfyUI keeps what is known of this machine, and how room is made to measure it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import comfy.model_management
import folder_paths
import torch

from ...engine.compute.stored_products import StoredProduct
from ...engine.hardware import Hardware
from ...engine.runs.dtype_choice import half_is_faster
from ...engine.runs.known_speeds import KnownSpeeds
from ...engine.runs.known_trials import KnownTrials


def known_speeds(
    hardware: Hardware,
    dtype: torch.dtype,
    model_file: Path,
    product: StoredProduct | None = None,
    others: Sequence[Hardware] = (),
) -> KnownSpeeds:
    """The speeds of one device in one dtype, and of the folder that holds a model, in ComfyUI's user folder. `product`:
    as KnownSpeeds has it. `others`: further devices, that compute beside it."""
    management = comfy.model_management
    return KnownSpeeds(
        hardware,
        dtype,
        model_file,
        file=_file("speeds.json"),
        device_name=management.get_torch_device_name(hardware.device),
        make_room=partial(management.free_memory, device=hardware.device),
        product=product,
        others={str(other.device): known_speeds(other, dtype, model_file, product) for other in others},
    )


def speeds_stamp() -> str:
    """Another text where what is known of this machine's card has changed; one without a card has none."""
    if comfy.model_management.get_torch_device().type == "cpu":
        return ""
    files = (_file("speeds.json"), _file("products.json"))
    return "/".join(str(file.stat().st_mtime_ns) if file.exists() else "" for file in files)


def known_trials() -> KnownTrials:
    """How kernels of attention did when they were tried on this machine, in ComfyUI's user folder."""
    return KnownTrials(_file("attention.json"))


def half_products_are_faster(hardware: Hardware) -> bool:
    """Than fp32, and right, on this card; measured once, and remembered in ComfyUI's user folder."""
    management, device = comfy.model_management, hardware.device
    make_room = partial(management.free_memory, device=device)
    tried = KnownTrials(_file("products.json"))
    return half_is_faster(hardware, management.get_torch_device_name(device), tried, make_room)


def _file(name: str) -> Path:
    return Path(folder_paths.get_user_directory()) / "qwen_lowvram" / name
