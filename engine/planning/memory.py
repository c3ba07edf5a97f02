"""Decide where each block lives. Integers in, a MemoryPlan out; imports no torch.

Guarantees: no stage's predicted peak is above its limit; every block lives in one place: on the device, in host memory
or in the file; more memory never makes the forecast slower, but for less than SLOTS_GAIN; what is refused does not fit,
and what the refusal suggests does.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from ..errors import DoesNotFit
from ..texts import size_text
from .draft import Draft, least_bytes, least_ram_bytes
from .footprint import TransformerFootprint
from .forecast import TYPICAL, Speeds
from .memory_plan import MemoryPlan, SecondaryDevice
from .overlap import RING_PIECES
from .request import GIB, Controls, Limits, SamplingRequest

# that a plan may have, the most welcome number first; and pieces of the ring, the smallest first
SLOTS = (2, 3, 1)
RINGS = (RING_PIECES, 6, 8, 12, 16)
# by which another number of slots has to be faster: forecasts do not tell less than that
SLOTS_GAIN = 1.05


def plan_memory(
    footprint: TransformerFootprint,
    request: SamplingRequest,
    limits: Limits,
    speeds: Speeds = TYPICAL,
    secondaries: tuple[SecondaryDevice, ...] = (),
    *,
    slots: Sequence[int] = SLOTS,
    rings: Sequence[int] = RINGS,
) -> MemoryPlan:
    """The fastest plan within the limits with two slots, unless another number of `slots` is faster by SLOTS_GAIN. Of
    equally fast ones that with the smallest of `rings`, then with the most resident blocks, then with the least
    chunking (chunks cost next to nothing). The blocks of `secondaries`, at the end of the model, stay on
    other devices.

    Raises DoesNotFit with what would fit.
    """
    footprint = without_secondaries(footprint, secondaries)
    plans = []
    for count, chunk in product(slots, footprint.mlp_chunks):
        for ring in rings:
            made = Draft(footprint, request, count, chunk, ring).plans(limits, speeds)
            plans += made
            if footprint.host or not any(plan.from_file for plan in made):
                break  # nothing passes through a larger one
    if not plans:
        raise _refusal(footprint, request, limits)
    return replace(min(plans, key=slowness), secondaries=secondaries)


def without_secondaries(
    footprint: TransformerFootprint, secondaries: Sequence[SecondaryDevice]
) -> TransformerFootprint:
    """What is left to the first device."""
    away = sum(len(secondary.blocks) for secondary in secondaries)
    return replace(footprint, blocks=footprint.blocks - away, elsewhere=away)


def slowness(plan: MemoryPlan) -> tuple[float, int, int, int]:
    """By which plans are compared: the least is the best."""
    wanted_gain = SLOTS_GAIN if plan.streamed and plan.slots != SLOTS[0] else 1.0
    return plan.forecast.seconds * wanted_gain, plan.ring, -len(plan.resident), -plan.kept.on_device


def _refusal(footprint: TransformerFootprint, request: SamplingRequest, limits: Limits) -> DoesNotFit:
    need, need_ram = least_bytes(footprint, request), least_ram_bytes(footprint, request)
    short_of_ram = limits.ram_bytes is not None and need_ram > limits.ram_bytes
    ways, beside = [], ""
    if request.controls:
        beside = f", {request.controls} of it"
        if _fits(footprint, replace(request, controls=Controls()), limits):
            ways.append("no ControlNet and no model patch")
    fewer = next(
        (n for n in range(request.branches - 1, 0, -1) if _fits(footprint, request.with_branches(n), limits)), None
    )
    if fewer is not None:
        ways.append(f"a smaller batch or no guidance ({fewer} instead of {request.branches} branches)")
    for width, height in footprint.suggested_sizes:
        smaller = request.with_size(width, height)
        if width * height < request.width * request.height and _fits(footprint, smaller, limits):
            ways.append(f"{width}x{height} ({size_text(least_bytes(footprint, smaller))})")
            break
    raised = []
    if need > limits.vram_bytes:
        raised.append(f"a VRAM limit of {need / GIB + 0.01:.2f} GB or more")
    if short_of_ram:
        raised.append(f"a RAM limit of {need_ram / GIB + 0.01:.2f} GB or more")
    ways.append(" and ".join(raised))
    if not short_of_ram:
        return DoesNotFit(
            "Sampling needs at least {need_bytes}{beside}, but the limit is {limit_bytes} ({request}).\nUse {ways}.",
            code="plan.sampling_does_not_fit",
            need_bytes=need,
            beside=beside,
            limit_bytes=limits.vram_bytes,
            request=request,
            ways=", or ".join(ways),
        )
    return DoesNotFit(
        "Sampling needs at least {need_bytes} and {need_ram_bytes} of RAM{beside}, but the limit is {limit_bytes} and "
        "{limit_ram_bytes} of RAM ({request}).\nUse {ways}.",
        code="plan.sampling_does_not_fit_in_ram",
        need_bytes=need,
        need_ram_bytes=need_ram,
        beside=beside,
        limit_bytes=limits.vram_bytes,
        limit_ram_bytes=limits.ram_bytes,
        request=request,
        ways=", or ".join(ways),
    )


def _fits(footprint: TransformerFootprint, request: SamplingRequest, limits: Limits) -> bool:
    enough_ram = limits.ram_bytes is None or least_ram_bytes(footprint, request) <= limits.ram_bytes
    return enough_ram and least_bytes(footprint, request) <= limits.vram_bytes
