"""What numbers were measured on: the machine, and the versions of what ran."""

import os
import platform
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

# what something here runs with; torch is needed
PACKAGES = (
    "diffusers",
    "accelerate",
    "bitsandbytes",
    "comfy-kitchen",
    "comfy-aimdo",
    "safetensors",
    "transformers",
    "gguf",
    "psutil",
    "numpy",
    "packaging",
    "pytest",
)


def do(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Raises ImportError without torch."""
    import torch
    from qwenimage_lowvram.engine.runs.machine_facts import cpu_name, package_version

    yield {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "ram_bytes": _ram_bytes(),
            "system": platform.platform(),
            **(_gpu(torch) if torch.cuda.is_available() else {"gpu": None}),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: package_version(name) for name in PACKAGES if _is_here(name)},
        },
        "absent": [name for name in PACKAGES if not _is_here(name)],
    }


def _gpu(torch: Any) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "gpu_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "allocator": torch.cuda.get_allocator_backend(),
    }


def _is_here(name: str) -> bool:
    return find_spec(name.replace("-", "_")) is not None


def _ram_bytes() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().total)
