"""What machine this is, for a report that a person shows to others: no path, no name of the machine or its user."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..drivers import driver_of
from ..host_ram import HostRam
from . import free_memory

_CPU_INFO = Path("/proc/cpuinfo")
_PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def machine_facts(device: torch.device) -> dict[str, Any]:
    """As JSON has it; None for what cannot be known here. device_bytes: of a device with memory of its own."""
    own = device.type in ("cuda", "xpu")
    return {
        "device": _name(device),
        "kind": _kind(device),
        "device_bytes": free_memory.total_bytes(device) if own else None,
        "ram_bytes": HostRam.now().total_bytes,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "rocm": torch.version.hip if device.type == "cuda" else None,
        "driver": driver_of(device),
        "comfy_kitchen": package_version("comfy-kitchen"),
        "pack": _pack_version(),
    }


def _kind(device: torch.device) -> str:
    return "rocm" if device.type == "cuda" and torch.version.hip is not None else device.type


def _name(device: torch.device) -> str:
    if device.type in ("cuda", "xpu"):
        return str(torch.get_device_module(device).get_device_name(device))
    return f"{cpu_name()}, {os.cpu_count()} threads" if device.type == "cpu" else platform.machine()


def cpu_name() -> str:
    """As the system tells it."""
    with suppress(OSError):
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _pack_version() -> str | None:
    with suppress(OSError):
        for line in _PROJECT.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition("=")
            if name.strip() == "version":
                return value.strip().strip('"')
    return None
