"""What tests/simulated_gpu takes the caching allocator and page-locking to do. As `assumptions`."""

from typing import Any

import torch
from torch import Tensor

from .card import Card, NotTried

NBYTES = 48 * 1024**2


def memory_goes_back_to_the_pool_of_its_stream(card: Card) -> tuple[bool, dict[str, Any]]:
    card.forget()
    side = card.side_stream()
    first = _new(card)
    address = card.address(first)
    del first
    with card.torch.stream(side):
        other = card.address(_new(card))
    again = card.address(_new(card))
    return address == again != other, {"allocator": torch.cuda.get_allocator_backend() if card.real else None}


def free_memory_is_cut_up_and_put_together_again(card: Card) -> tuple[bool, dict[str, Any]]:
    """For smaller requests of its stream, and for larger ones once its parts are free."""
    card.forget()
    whole = _new(card, 3)
    before = card.reserved()
    del whole
    parts = [_new(card) for _ in range(3)]
    seen = {"before": before, "cut_up": card.reserved()}
    del parts
    whole = _new(card, 3)
    seen["together"] = card.reserved()
    del whole
    return len(set(seen.values())) == 1, seen


def memory_is_handed_out_again_while_another_stream_reads_it(card: Card) -> tuple[bool, dict[str, Any]]:
    """At the last reference, as nothing calls record_stream."""
    return _reused(card, record=False) == (True, False), {}


def record_stream_keeps_memory_until_that_stream_is_done(card: Card) -> tuple[bool, dict[str, Any]]:
    _real_only(card)
    return not _reused(card, record=True)[0], {}


def _reused(card: Card, *, record: bool) -> tuple[bool, bool]:
    """Whether memory that a side stream reads was handed out again, and whether the side stream was done by then."""
    card.forget()
    side = card.side_stream()
    source, out = _new(card), _new(card)
    address = card.address(source)
    card.factor()
    card.torch.synchronize(card.device)
    with card.torch.stream(side):
        card.busy()
        out.copy_(source)
    behind = card.recorded(side)
    if record:
        source.record_stream(side)
    del source
    return card.address(_new(card)) == address, behind.query()


def a_refused_page_lock_is_reported_once_more_by_the_next_kernel(card: Card) -> tuple[bool, dict[str, Any]]:
    """The engine launches one behind a refusal, so that nobody else's fails. Harmless where that does not hold."""
    _real_only(card)
    data = card.locked(NBYTES)
    again, refused = None, not card.lock(data)
    try:
        torch.zeros(1, device=card.device).add_(1)
        card.torch.synchronize(card.device)
    except RuntimeError as error:
        again = str(error).splitlines()[0]
    card.unlock(data)
    torch.zeros(1, device=card.device).add_(1)  # whatever it was, it is over
    card.torch.synchronize(card.device)
    return refused and again is not None, {"refused": refused, "reported": again}


def unlocking_returns_zero_and_what_is_not_locked_an_error(card: Card) -> tuple[bool, dict[str, Any]]:
    _real_only(card)
    data = card.locked(NBYTES)
    codes = [int(card.unlock(data)) for _ in range(2)]  # type: ignore[call-overload]
    try:
        torch.zeros(1, device=card.device).add_(1)
    except RuntimeError:
        codes.append(-1)
    return codes[0] == 0 != codes[1], {"codes": codes}


def torch_keeps_to_the_share_that_it_is_given(card: Card) -> tuple[bool, dict[str, Any]]:
    """By raising OutOfMemoryError. Small cards are emulated so."""
    _real_only(card)
    card.forget()
    total = torch.cuda.get_device_properties(card.device).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2 * NBYTES) / total)
        kept, more = [_new(card)], 0
        try:
            while more < 8:
                kept.append(_new(card))
                more += 1
        except torch.OutOfMemoryError:
            return more <= 2, {"more": more}
        return False, {"more": more}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


ALLOCATOR = (
    memory_goes_back_to_the_pool_of_its_stream,
    free_memory_is_cut_up_and_put_together_again,
    memory_is_handed_out_again_while_another_stream_reads_it,
    record_stream_keeps_memory_until_that_stream_is_done,
    a_refused_page_lock_is_reported_once_more_by_the_next_kernel,
    unlocking_returns_zero_and_what_is_not_locked_an_error,
    torch_keeps_to_the_share_that_it_is_given,
)


def _new(card: Card, parts: int = 1) -> Tensor:
    return torch.empty(parts * NBYTES, dtype=torch.uint8, device=card.device)


def _real_only(card: Card) -> None:
    if not card.real:
        raise NotTried("the simulated card has none of it")
