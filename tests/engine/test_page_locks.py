"""Pages are locked in the context of the card that copies from them, and what the driver answers is read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from qwenimage_lowvram.engine.page_locks import CudaPageLocks


def test_the_driver_locks_and_unlocks_in_the_context_of_the_right_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here: a list stands for it. Its codes are read, and an error's echo is not left to others."""
    calls: list[tuple[str, str]] = []
    context, codes = ["cuda:0"], iter([0, 0, 2, 2])

    @contextmanager
    def within(device: torch.device) -> Iterator[None]:
        context.append(str(device))
        yield
        context.pop()

    def called(name: str) -> Callable[..., int]:
        def call(*arguments: int) -> int:
            calls.append((name, context[-1]))
            return next(codes)

        return call

    driver = SimpleNamespace(cudaHostRegister=called("lock"), cudaHostUnregister=called("unlock"))
    monkeypatch.setattr(torch.cuda, "device", within)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: calls.append(("kernel", str(device))) or torch.ones(1))
    card, data, locks = torch.device("cuda:1"), torch.empty(8, dtype=torch.uint8), CudaPageLocks()
    assert locks.lock(data, card)
    assert locks.unlock(data, card)
    assert not locks.lock(data, card)
    assert not locks.unlock(data, card)
    assert calls == [(name, "cuda:1") for name in ("lock", "unlock", "lock", "kernel", "unlock", "kernel")]
