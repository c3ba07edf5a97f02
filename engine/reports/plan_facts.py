"""A plan's numbers as a page or another program shows them, in any language. Decides nothing; imports no torch."""

from typing import Any

from ..compute.attention_kernels import FUSED
from ..planning.memory_plan import MemoryPlan


def plan_facts(plan: MemoryPlan, *, host: bool, advice: str = "", one_by_one: str = "") -> dict[str, Any]:
    """As JSON has it. host: the device is the host. advice, one_by_one: as the run has them."""
    request, run = plan.request, plan.run
    return {
        "width": request.width,
        "height": request.height,
        "branches": plan.whole_request.branches,
        "blocks": plan.blocks + sum(len(other.blocks) for other in plan.secondaries),
        "resident": len(plan.resident),
        "further": [
            {"device": other.device, "peak_bytes": other.peak_bytes, "limit_bytes": other.limit_bytes}
            for other in plan.further
        ],
        "elsewhere": sum(len(other.blocks) for other in plan.secondaries),
        "held": len(plan.held),
        "from_file": plan.from_file,
        "host": host,
        "bound": plan.forecast.bound.name.lower(),
        "seconds_per_step": plan.forecast.seconds,
        "first_seconds": run.first_seconds,
        "again_seconds": run.again_seconds,
        "peak_bytes": plan.peak_bytes,
        "limit_bytes": plan.limit_bytes,
        "weights_bytes": plan.resident_bytes,
        "activation_bytes": plan.activation_bytes,
        "ram_peak_bytes": plan.ram_peak_bytes,
        "ram_limit_bytes": plan.limits.ram_bytes,
        "streamed_bytes": plan.streamed_bytes_per_step,
        "attention": plan.attention if plan.attention != FUSED.name else "",
        "advice": advice,
        "one_by_one": one_by_one,
    }
