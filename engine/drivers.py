"""Which driver a card has."""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import torch

_NVML = "nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1"
_NVML_TEXT_BYTES = 81  # nvml.h: NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE, and one to spare


def nvidia_driver(load: Callable[[str], Any] = ctypes.CDLL) -> str | None:
    """The version of NVIDIA's driver, by its own library (NVML), which comes with it; None where it is not there."""
    try:
        nvml = load(_NVML)
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    text = ctypes.create_string_buffer(_NVML_TEXT_BYTES)
    try:
        failed = nvml.nvmlSystemGetDriverVersion(text, _NVML_TEXT_BYTES - 1) != 0
    finally:
        nvml.nvmlShutdown()
    return None if failed else text.value.decode("ascii", "replace")


def driver_of(device: torch.device) -> str | None:
    """The version of its driver; None for a device without one of its own, and where that is not told."""
    if device.type == "cuda" and torch.version.hip is None:
        return nvidia_driver()
    return str(torch.xpu.get_device_properties(device).driver_version) if device.type == "xpu" else None
