"""`python dev.py bench NAME`: run one benchmark, print its table, write it with the machine's description."""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cache import REPOSITORY
from .comfyui import comfyui_version, require_comfyui

BENCHMARKS = REPOSITORY / "benchmarks"
_FIRST_COLUMNS = ("who", "case", "seconds", "peak_bytes")


def main(arguments: list[str]) -> int:
    names = sorted(file.stem for file in BENCHMARKS.glob("*.py") if not file.stem.startswith("_"))
    parser = argparse.ArgumentParser(prog="dev.py bench")
    parser.add_argument("name", choices=names, metavar="NAME", help=f"one of: {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="a smaller run that shows the same things")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows to FILE")
    options = parser.parse_args(arguments)
    rows = load(BENCHMARKS / f"{options.name}.py").rows(options.quick)
    machine = describe_machine()
    print("; ".join(f"{_title(key)} {_cell(key, value)}" for key, value in machine.items() if value is not None))
    print(table(rows))
    if options.json is not None:
        command = f"python dev.py bench {options.name}{' --quick' if options.quick else ''}"
        written = json.dumps({"command": command, "machine": machine, "rows": rows}, indent=1)
        options.json.write_text(written + "\n", encoding="utf-8")
        print(f"Written to {options.json}")
    return 0


def load(file: Path) -> Any:
    """Import a benchmark from its file: the repository itself is never on the path."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError(file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned columns: who, case, seconds and peak first, the rest as they come; bytes as GB, nothing for None."""
    present = list(dict.fromkeys(key for row in rows for key, value in row.items() if value is not None))
    columns = [
        *(key for key in _FIRST_COLUMNS if key in present),
        *(key for key in present if key not in _FIRST_COLUMNS),
    ]
    cells = [[_title(key) for key in columns], *([_cell(key, row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    right = [any(isinstance(row.get(key), int | float) for row in rows) for key in columns]
    return "\n".join(
        "  ".join(
            text.rjust(w) if r else text.ljust(w) for text, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    )


def describe_machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import psutil
    import torch
    from qwenimage_lowvram.engine.runs.machine_facts import cpu_name, package_version

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": package_version("diffusers"),
        "comfyui": comfyui_version(require_comfyui()),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _is_bytes(key: str) -> bool:
    return key.endswith("_bytes") or key.startswith("bytes_")


def _title(key: str) -> str:
    return key.removesuffix("_bytes").removeprefix("bytes_") + " GB" if _is_bytes(key) else key


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if _is_bytes(key) and isinstance(value, int | float):
        return f"{value / 1e9:.3f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
