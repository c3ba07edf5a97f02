"""Where ComfyUI keeps what is known of this machine's speeds, and how room is made to measure them."""

from functools import partial
from pathlib import Path

import comfy.model_management
import folder_paths
import torch

from ...engine.hardware import Hardware
from ...engine.runs.known_speeds import KnownSpeeds


def known_speeds(hardware: Hardware, dtype: torch.dtype, model_file: Path) -> KnownSpeeds:
    """The speeds of one device in one dtype, and of the folder that holds a model, in ComfyUI's user folder."""
    management = comfy.model_management
    return KnownSpeeds(
        hardware,
        dtype,
        model_file,
        file=Path(folder_paths.get_user_directory()) / "qwen_lowvram" / "speeds.json",
        device_name=management.get_torch_device_name(hardware.device),
        make_room=partial(management.free_memory, device=hardware.device),
    )
