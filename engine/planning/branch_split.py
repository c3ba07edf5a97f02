"""Divide the branches of a step among devices that each see all blocks. Integers in, a MemoryPlan out; imports no
torch.

Guarantees: each device keeps its own limit, and all together that of host memory: a block is held once, and read once,
for all of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..compute.linear_layers import DECODED_LAYERS
from ..errors import DoesNotFit
from .footprint import TransformerFootprint
from .forecast import Speeds, StepForecast
from .memory import RINGS, SLOTS, plan_memory, slowness
from .memory_plan import BranchDevice, MemoryPlan
from .request import Limits, SamplingRequest

# that the first device has at a time beside those of its own branches: what comes back, and what is made of it
HANDED_ON = 2


@dataclass(frozen=True)
class Card:
    """A further device: what may be held there, and what it does in a second."""

    device: str
    limit_bytes: int
    speeds: Speeds


def plan_branches(
    footprint: TransformerFootprint, request: SamplingRequest, limits: Limits, speeds: Speeds, others: Sequence[Card]
) -> MemoryPlan | None:
    """The fastest plan in which some of `others` compute branches beside the first device; None where none fits, or
    where this request's are not divided: a single one, those that ControlNets hand something to, and those of a network
    that keeps what blocks make of a prompt. Of the others, the fastest ones take part."""
    if request.controls or request.ranks > 1 or footprint.host or footprint.kept_block_bytes(request):
        return None
    fastest = sorted(others, key=lambda card: -card.speeds.flops)
    found = [
        plan
        for count in range(1, min(len(fastest), request.branches - 1) + 1)
        for plan in _plans(footprint, request, limits, speeds, fastest[:count])
    ]
    return min(found, key=slowness, default=None)


def branch_counts(branches: int, flops: Sequence[float]) -> list[int]:
    """How many branches devices of these speeds compute, so that the last one is done as early as can be; each at least
    one."""
    counts = [1] * len(flops)
    for _ in range(branches - len(flops)):
        soonest = min(range(len(flops)), key=lambda i: ((counts[i] + 1) / flops[i], i))
        counts[soonest] += 1
    return counts


def _plans(
    footprint: TransformerFootprint, request: SamplingRequest, limits: Limits, speeds: Speeds, others: Sequence[Card]
) -> Iterator[MemoryPlan]:
    """One for each number of slots and size of the ring that fits."""
    counts = branch_counts(request.branches, [speeds.flops, *(card.speeds.flops for card in others)])
    shares = [_Share(footprint, _share(request, counts[0]), limits, speeds)]
    for card, count in zip(others, counts[1:], strict=True):
        own = replace(_share(request, count), step_cache=None)  # what steps are predicted from is the first device's
        shares.append(_Share(_blocks_alone(footprint), own, replace(limits, vram_bytes=card.limit_bytes), card.speeds))
    for slots in SLOTS:
        for ring in RINGS:
            try:
                plans = _side_by_side([share.plan(slots, ring) for share in shares], shares, slots, ring)
            except DoesNotFit:
                break  # nor does it with a larger ring
            if plans is not None and _hands_on_within(footprint, plans[0]):
                yield _together(footprint, plans, others, [share.speeds for share in shares])
            if not any(plan.from_file for plan in plans or ()):
                break


@dataclass(frozen=True)
class _Share:
    """Of one device."""

    footprint: TransformerFootprint
    request: SamplingRequest
    limits: Limits
    speeds: Speeds

    def plan(self, slots: int, ring: int, ram_taken_bytes: int = 0) -> MemoryPlan:
        ram = self.limits.ram_bytes
        limits = self.limits if ram is None else replace(self.limits, ram_bytes=ram - ram_taken_bytes)
        return plan_memory(self.footprint, self.request, limits, self.speeds, slots=(slots,), rings=(ring,))


def _share(request: SamplingRequest, branches: int) -> SamplingRequest:
    return replace(request.with_branches(branches), beside=request.branches - branches)


def _blocks_alone(footprint: TransformerFootprint) -> TransformerFootprint:
    """Of a device that computes nothing else of the model."""
    return replace(
        footprint,
        outside_bytes=0,
        modulation_slot_bytes=0,
        modulation_staging_bytes=0,
        modulation_scratch_bytes=0,
        modulation_stored_bytes=0,
        modulation_linear=DECODED_LAYERS,
    )


def _side_by_side(
    plans: Sequence[MemoryPlan], shares: Sequence["_Share"], slots: int, ring: int
) -> list[MemoryPlan] | None:
    """The same with one set of held blocks: behind the resident ones of the device that has the fewest. What another
    has resident beyond those is held nevertheless. None where host memory would not do for that."""
    fewest = min(plans, key=lambda plan: len(plan.resident))
    found = []
    for plan, share in zip(plans, shares, strict=True):
        beyond = len(plan.resident) - len(fewest.resident)
        ram = share.limits.ram_bytes
        if beyond and ram is not None:
            needed = plan.ram_peak_bytes - len(plan.held) * share.footprint.stored_bytes
            taken = min(beyond * share.footprint.stored_bytes, ram - needed)
            plan = share.plan(slots, ring, taken)
        found.append(plan)
    held = {index for plan in found for index in plan.held}
    return found if len(held) <= len(fewest.held) else None


def _hands_on_within(footprint: TransformerFootprint, plan: MemoryPlan) -> bool:
    """Whether the first device, where all branches begin and end, has room for those of others while its own are not in
    a block."""
    own, chunk = replace(plan.request, beside=0), plan.mlp_chunk_tokens
    all_bytes = footprint.activation_bytes(own, chunk)
    branch_bytes = footprint.activation_bytes(replace(own, branches=own.branches + 1), chunk) - all_bytes
    tokens = own.image_tokens + own.prompt_tokens
    handed_bytes = (plan.request.beside + HANDED_ON) * tokens * footprint.inner_dim * footprint.element_bytes
    return handed_bytes <= all_bytes - own.branches * branch_bytes


def _together(
    footprint: TransformerFootprint, plans: Sequence[MemoryPlan], others: Sequence[Card], speeds: Sequence[Speeds]
) -> MemoryPlan:
    first, *beside = plans
    slowest = max((plan.forecast for plan in plans), key=lambda forecast: forecast.seconds)
    handing_on = _link_seconds(footprint, first.request, min(one.bus_bytes for one in speeds))
    step = replace(
        slowest,
        slowed_seconds=slowest.slowed_seconds + handing_on,
        pass_seconds=_later(slowest, handing_on),
    )
    run = replace(
        first.run,
        load_seconds=max(plan.run.load_seconds for plan in plans),
        first_step_seconds=max(plan.run.first_step_seconds for plan in plans) + handing_on,
        step_seconds=step.seconds,
    )
    devices = zip(others, beside, strict=True)
    return replace(
        first,
        forecast=step,
        run=run,
        ram_peak_bytes=max(plan.ram_peak_bytes for plan in plans),
        beside=tuple(BranchDevice(card.device, plan) for card, plan in devices),
    )


def _later(forecast: StepForecast, seconds: float) -> float:
    return forecast.seconds + seconds if forecast.pass_seconds else 0.0


def _link_seconds(footprint: TransformerFootprint, request: SamplingRequest, bus_bytes: float) -> float:
    """Of what goes into the first block of the others' branches, and comes back behind the last one: by way of the host
    where devices have no way of their own."""
    tokens = request.image_tokens + request.prompt_tokens
    return 2 * request.beside * tokens * footprint.inner_dim * footprint.element_bytes / bus_bytes
