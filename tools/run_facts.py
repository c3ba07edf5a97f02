"""The facts of a plan as the server sends them while a card with memory of its own works: for pages without a run."""

from typing import Any

GIB = 2**30
FACTS: dict[str, Any] = {
    "width": 1024, "height": 1024, "branches": 2, "blocks": 60, "resident": 26, "further": [], "elsewhere": 0,
    "held": 20, "from_file": 14, "host": False, "bound": "compute", "seconds_per_step": 11.5, "first_seconds": 260.0,
    "again_seconds": 230.0, "peak_bytes": 3 * GIB, "limit_bytes": 4 * GIB, "weights_bytes": 2 * GIB,
    "activation_bytes": GIB, "ram_peak_bytes": 8 * GIB, "ram_limit_bytes": None, "streamed_bytes": 5 * GIB,
    "attention": "", "advice": "", "one_by_one": "",
}  # fmt: skip
