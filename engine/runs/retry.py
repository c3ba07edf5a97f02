"""Where memory runs out although it was planned: do it again, with a smaller plan, until it fits or none does."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from ..out_of_memory import OutOfMemory, OutOfRam, Short, ran_out, reason, shortage
from ..planning.draft import least_bytes, least_ram_bytes
from ..planning.memory_plan import MemoryPlan
from ..planning.request import Limits
from ..texts import size_text
from .sampling_plan import Transformer
from .surroundings import Surroundings

# after running out of memory although enough seemed free: plan for this part of what the last plan took, then for its
# powers, so that a few tries reach the least
SMALLER = 0.85
# each with a smaller plan than the one before
MOST_TRIES = 8

T = TypeVar("T")


def attempt(
    action: Callable[[], T],
    plan_smaller: Callable[[Short, str, float], None],
    give_up: Callable[[Short, str], Exception],
) -> T:
    """Do it; where memory runs out, plan smaller and do it again.

    plan_smaller(what ran out, why, part of the last plan) prepares the next try, or raises where no smaller plan fits.
    give_up(what ran out, why) makes the error where the last try fails.
    """
    tries = 0
    while True:
        try:
            return action()
        except Exception as error:
            short = shortage(error)
            if short is None:
                raise
            why = reason(error)
        # after the except block: the traceback keeps the failed attempt's tensors alive
        tries += 1
        if tries == MOST_TRIES:
            raise give_up(short, why)
        plan_smaller(short, why, SMALLER**tries)


def smaller_limits(
    transformer: Transformer, plan: MemoryPlan, short: Short, part: float, surroundings: Surroundings
) -> Limits:
    """What is really free now; where that is as much as before, that part of the last plan."""
    hardware, limits = transformer.hardware, plan.limits
    if short is Short.HOST and not (hardware.host_device or hardware.unified):
        least = least_ram_bytes(transformer.footprint, plan.whole_request)
        # the least is granted, as when the run began
        free = max(least, surroundings.free_ram() + transformer.store.held_bytes)
        return replace(limits, ram_bytes=_below(plan.ram_peak_bytes, free, part, least))
    least = least_bytes(transformer.footprint, plan.whole_request)
    free = surroundings.device_bytes(
        hardware.device, limits.vram_bytes, plan.peak_bytes, transformer.footprint.slot_bytes
    )
    return replace(limits, vram_bytes=_below(plan.peak_bytes, free, part, least))


def no_memory(plan: MemoryPlan, short: Short, why: str) -> OutOfMemory | OutOfRam:
    """The error of a run that ran out of memory within its smallest plan."""
    planned = (
        f"although {size_text(plan.peak_bytes)} were planned of {size_text(plan.limit_bytes)} ({plan.whole_request})"
    )
    if short is Short.HOST:
        planned = f"although no more than {size_text(plan.ram_peak_bytes)} of it were planned ({plan.whole_request})"
    return ran_out(planned, short, why)


def _below(last: int, free: int, part: float, least: int) -> int:
    """A limit under `last`: what is free where that is less, else that part of it, but no less than the least."""
    return free if free < last else min(max(int(last * part), least), last - 1)
