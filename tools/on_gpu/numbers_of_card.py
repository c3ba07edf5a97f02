"""Rates that the simulated GPU and the model of a step are given, measured on a card. Needs torch alone."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .card import Card, NotTried

LAUNCHES = 2000
NBYTES = 256 * 1024**2
TURNS = 5


def launches(card: Card) -> dict[str, float]:
    """Seconds of the host for one, and of the card for the smallest one."""
    x = torch.zeros(16, device=card.device)
    side, event = card.side_stream(), card.torch.Event()

    def each(action: Callable[[], object]) -> float:
        action()
        card.torch.synchronize(card.device)
        start = time.perf_counter()
        for _ in range(LAUNCHES):
            action()
        return (time.perf_counter() - start) / LAUNCHES

    def on_side() -> None:
        with card.torch.stream(side):
            x.add_(1)

    with torch.inference_mode(False):
        kernel = each(lambda: x.add_(1))
        card.torch.synchronize(card.device)
        first, last = (card.torch.Event(enable_timing=True) for _ in range(2))
        first.record(card.compute)
        for _ in range(LAUNCHES):
            x.add_(1)
        last.record(card.compute)
        last.synchronize()
        return {
            "launch_seconds": kernel,
            "small_kernel_seconds": first.elapsed_time(last) / 1000 / LAUNCHES,
            "launch_on_side_seconds": each(on_side),
            "record_seconds": each(lambda: event.record(card.compute)),
            "wait_event_seconds": each(lambda: side.wait_event(event)),
            "allocate_seconds": each(lambda: torch.empty(NBYTES, dtype=torch.uint8, device=card.device)),
        }


def copies(card: Card) -> dict[str, float]:
    """Bytes per second, both ways, from page-locked memory and from other."""
    pageable = torch.ones(NBYTES, dtype=torch.uint8)
    locked, there = card.locked(NBYTES), torch.empty(NBYTES, dtype=torch.uint8, device=card.device)
    try:
        return {
            "to_card_locked": NBYTES / _seconds(card, lambda: there.copy_(locked, non_blocking=True)),
            "to_card_pageable": NBYTES / _seconds(card, lambda: there.copy_(pageable, non_blocking=True)),
            "to_host_locked": NBYTES / _seconds(card, lambda: locked.copy_(there, non_blocking=True)),
            "to_host_pageable": NBYTES / _seconds(card, lambda: pageable.copy_(there)),
            "on_card": NBYTES / _seconds(card, lambda: there[: NBYTES // 2].copy_(there[NBYTES // 2 :])) / 2,
        }
    finally:
        card.torch.synchronize(card.device)
        card.unlock(locked)


def page_locks(card: Card) -> dict[str, float]:
    """Bytes per second that are locked and unlocked, of memory that was written before and of memory that was not."""
    found: dict[str, list[float]] = {}
    for _ in range(3):
        for name, make in (("touched", torch.ones), ("untouched", torch.empty)):
            data: Tensor = make(NBYTES, dtype=torch.uint8)
            start = time.perf_counter()
            if not card.lock(data):
                raise NotTried("the system refuses to page-lock memory")
            middle = time.perf_counter()
            card.unlock(data)
            found.setdefault(f"lock_{name}", []).append(NBYTES / (middle - start))
            found.setdefault(f"unlock_{name}", []).append(NBYTES / (time.perf_counter() - middle))
    return {name: statistics.median(rates) for name, rates in found.items()}


def computing_beside_copies(card: Card) -> dict[str, float]:
    """Flops of matrix products alone and beside copies from page-locked memory, whose rate is told too: the simulated
    card takes neither to slow the other down."""
    locked, there = card.locked(NBYTES), torch.empty(NBYTES, dtype=torch.uint8, device=card.device)
    side, flops = card.side_stream(), 2.0 * card.size**3 * card.turns
    try:
        alone = _seconds(card, card.busy)
        copy_alone = _seconds(card, lambda: there.copy_(locked, non_blocking=True))
        count = max(1, int(alone / copy_alone))
        first, last = (card.torch.Event(enable_timing=True) for _ in range(2))
        done = card.torch.Event(enable_timing=True)
        first.record(card.compute)
        side.wait_event(first)
        with card.torch.stream(side):
            for _ in range(count):
                there.copy_(locked, non_blocking=True)
        last.record(side)
        card.busy()
        done.record(card.compute)
        card.torch.synchronize(card.device)
        return {
            "flops_alone": flops / alone,
            "flops_beside_copies": flops / (first.elapsed_time(done) / 1000),
            "to_card_alone": NBYTES / copy_alone,
            "to_card_beside_computing": count * NBYTES / (first.elapsed_time(last) / 1000),
        }
    finally:
        card.torch.synchronize(card.device)
        card.unlock(locked)


NUMBERS = (launches, copies, page_locks, computing_beside_copies)


def names() -> list[str]:
    return [measure.__name__.replace("_", " ") for measure in NUMBERS]


def measured(card: Card) -> Iterator[dict[str, Any]]:
    for name, measure in zip(names(), NUMBERS, strict=True):
        try:
            yield {"case": name, "status": "measured", **measure(card)}
        except NotTried as why:
            yield {"case": name, "status": "skipped", "why": str(why)}
        except Exception as error:
            yield {"case": name, "status": "failed", "why": f"{type(error).__name__}: {error}"}


def do(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"names": names()}
    yield from measured(Card.real_one(torch.device("cuda", 0)))


def _seconds(card: Card, action: Callable[[], object]) -> float:
    """The median of some turns, after one that does not count."""
    taken = []
    for _ in range(TURNS + 1):
        card.torch.synchronize(card.device)
        start = time.perf_counter()
        action()
        card.torch.synchronize(card.device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
