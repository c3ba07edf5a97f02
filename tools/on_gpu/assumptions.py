"""What tests/simulated_gpu takes a card to do, tried on a card: copies, streams and events, the allocator.

Each function's name is the assumption; it returns whether that held, and what was seen. Needs torch alone.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .allocator_checks import ALLOCATOR
from .card import Card, NotTried

Seen = dict[str, Any]
Check = Callable[[Card], tuple[bool, Seen]]
COPY_BYTES = 1024**2
SIZES = (4096, COPY_BYTES, 64 * COPY_BYTES)


def page_locked_memory_is_read_when_the_copy_runs(card: Card) -> tuple[bool, Seen]:
    data, out = card.locked(COPY_BYTES), torch.empty(COPY_BYTES, dtype=torch.uint8, device=card.device)
    try:
        data.fill_(1)
        card.busy()
        start = time.perf_counter()
        out.copy_(data, non_blocking=True)
        seconds = time.perf_counter() - start
        data.fill_(2)
        there = int(out.cpu()[-1])
    finally:
        card.unlock(data)
    return there == 2, {"call_seconds": seconds}


def pageable_memory_is_taken_at_once(card: Card) -> tuple[bool, Seen]:
    """The simulated card does not wait for its stream's work there; call_seconds tell whether a real one does."""
    right, seen = True, {}
    for nbytes in SIZES if card.real else SIZES[:1]:
        data, out = torch.ones(nbytes, dtype=torch.uint8), torch.empty(nbytes, dtype=torch.uint8, device=card.device)
        card.busy()
        start = time.perf_counter()
        out.copy_(data, non_blocking=True)
        seen[f"call_seconds_{nbytes}"] = time.perf_counter() - start
        data.fill_(2)
        values = out.cpu()
        right = right and bool((values == 1).all())
    return right, seen


def a_blocking_copy_waits_for_its_stream(card: Card) -> tuple[bool, Seen]:
    data, out = card.locked(COPY_BYTES), torch.empty(COPY_BYTES, dtype=torch.uint8, device=card.device)
    try:
        card.busy()
        behind = card.recorded()
        out.copy_(data)
        passed = behind.query()
    finally:
        card.unlock(data)
    return passed, {}


def a_copy_to_the_host_waits_for_its_stream(card: Card) -> tuple[bool, Seen]:
    out = torch.zeros(4, device=card.device)
    card.busy()
    behind = card.recorded()
    out.cpu()
    return behind.query(), {}


def the_host_is_ahead_of_the_card_and_events_measure_the_card(card: Card) -> tuple[bool, Seen]:
    first, last = (card.torch.Event(enable_timing=True) for _ in range(2))
    card.factor()
    first.record(card.compute)
    start = time.perf_counter()
    card.busy()
    issued = time.perf_counter() - start
    last.record(card.compute)
    last.synchronize()
    taken = first.elapsed_time(last) / 1000
    return issued < taken / 2, {"issued_seconds": issued, "card_seconds": taken}


def a_side_stream_waits_for_nothing_by_itself(card: Card) -> tuple[bool, Seen]:
    out, side = torch.zeros(4, device=card.device), card.side_stream()
    card.torch.synchronize(card.device)
    card.busy()
    behind = card.recorded()
    with card.torch.stream(side):
        out.fill_(1)
    card.recorded(side).synchronize()
    return not behind.query(), {}


def a_stream_runs_behind_the_event_that_it_waits_for(card: Card) -> tuple[bool, Seen]:
    side = card.side_stream()
    card.busy()
    behind = card.recorded()
    side.wait_event(behind)
    card.recorded(side).synchronize()
    return behind.query(), {}


def waiting_captures_the_latest_record(card: Card) -> tuple[bool, Seen]:
    side, event = card.side_stream(), card.torch.Event()
    card.torch.synchronize(card.device)
    event.record(card.compute)
    side.wait_event(event)
    card.busy()
    event.record(card.compute)
    card.recorded(side).synchronize()
    return not event.query(), {}


def an_event_that_was_never_recorded_holds_nobody_up(card: Card) -> tuple[bool, Seen]:
    event, side = card.torch.Event(), card.side_stream()
    card.busy()
    behind = card.recorded()
    event.synchronize()
    side.wait_event(event)
    card.recorded(side).synchronize()
    return event.query() and not behind.query(), {}


def another_thread_has_the_default_stream(card: Card) -> tuple[bool, Seen]:
    default, side, seen = card.compute, card.side_stream(), []
    with card.torch.stream(side):
        thread = threading.Thread(target=lambda: seen.append(card.torch.current_stream(card.device)))
        thread.start()
        thread.join()
        here = card.compute
    return seen == [default] and here == side, {}


def a_copy_between_cards_waits_for_both(card: Card) -> tuple[bool, Seen]:
    if card.real and torch.cuda.device_count() < 2:
        raise NotTried("there is one card")
    there = torch.device(card.device.type, 1 if card.device.index in (0, None) else 0)
    source = torch.ones(4, device=card.device)
    card.busy()
    behind = card.recorded()
    out = source.to(there)
    event = card.torch.Event()
    event.record(card.torch.current_stream(there))
    event.synchronize()
    return behind.query() and out.cpu().tolist() == [1] * 4, {}


ASSUMPTIONS: tuple[Check, ...] = (
    page_locked_memory_is_read_when_the_copy_runs,
    pageable_memory_is_taken_at_once,
    a_blocking_copy_waits_for_its_stream,
    a_copy_to_the_host_waits_for_its_stream,
    the_host_is_ahead_of_the_card_and_events_measure_the_card,
    a_side_stream_waits_for_nothing_by_itself,
    a_stream_runs_behind_the_event_that_it_waits_for,
    waiting_captures_the_latest_record,
    an_event_that_was_never_recorded_holds_nobody_up,
    another_thread_has_the_default_stream,
    *ALLOCATOR,
    a_copy_between_cards_waits_for_both,
)


def names() -> list[str]:
    return [_name(check) for check in ASSUMPTIONS]


def tried(card: Card) -> Iterator[Seen]:
    """A row for each assumption; one that fails on the way does not end the others."""
    for check in ASSUMPTIONS:
        try:
            held, seen = check(card)
        except NotTried as why:
            yield {"case": _name(check), "status": "skipped", "why": str(why)}
        except Exception as error:
            yield {"case": _name(check), "status": "failed", "why": f"{type(error).__name__}: {error}"}
        else:
            yield {"case": _name(check), "status": "holds" if held else "does not hold", **seen}


def do(job: Seen) -> Iterator[Seen]:
    yield {"names": names()}
    yield from tried(Card.real_one(torch.device("cuda", 0)))


def _name(check: Check) -> str:
    return check.__name__.replace("_", " ")
