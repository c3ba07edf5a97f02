"""Pages are locked through ComfyUI, whose count and limit hold for our blocks too. A table stands for the driver."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.page_locks import CudaPageLocks
from qwenimage_lowvram.engine.streaming import PinnedMemory

CARD = torch.device("cuda", 1)
MIB = 1024**2
pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture
def management(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """ComfyUI's, as it is on a card with 4 MB of memory to lock."""
    management = comfy.model_management
    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", 4 * MIB)
    monkeypatch.setattr(management, "TOTAL_PINNED_MEMORY", 0)
    monkeypatch.setattr(management, "PINNED_MEMORY", {})
    monkeypatch.setattr(management, "discard_cuda_async_error", lambda: None)
    return management


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`locked`: sizes by address; `within`: cards in whose context calls were made; `code`: what it answers."""
    driver = SimpleNamespace(locked={}, within=[], code=0)

    def device(card: torch.device) -> AbstractContextManager[None]:
        driver.within.append(card)
        return nullcontext()

    def register(address: int, nbytes: int, flags: int) -> int:
        if not driver.code:
            driver.locked[address] = nbytes
        return int(driver.code)

    def unregister(address: int) -> int:
        if not driver.code:
            del driver.locked[address]
        return int(driver.code)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(
        torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    )
    return driver


def memory() -> PinnedMemory:
    from qwenimage_lowvram.nodes.adapters.page_locks import page_locks

    hardware = Hardware(CARD, True, True, True, host_device=False, pinned_limit_bytes=2**40, page_locks=page_locks())
    return PinnedMemory(hardware)


def test_one_count_bounds_comfyuis_and_ours(
    management: Any, driver: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = torch.empty(MIB, dtype=torch.uint8)
    assert management.pin_memory(theirs)
    ours = memory()
    buffers = [ours.take(MIB) for _ in range(4)]
    assert [buffer.pinned for buffer in buffers] == [True] * 3 + [False]
    assert management.TOTAL_PINNED_MEMORY == sum(driver.locked.values()) == 4 * MIB
    assert set(driver.within) == {CARD}
    assert not caplog.records  # that is no refusal
    assert management.unpin_memory(theirs)
    assert ours.take(MIB).pinned
    buffers.clear()
    assert management.TOTAL_PINNED_MEMORY == 0
    assert not driver.locked


def test_what_comfyuis_models_do_not_use_makes_room(
    management: Any, driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = torch.empty(4 * MIB, dtype=torch.uint8)
    management.pin_memory(theirs)

    def give_back(size: int, *args: Any, **kwargs: Any) -> int:
        management.unpin_memory(theirs)
        return 4 * MIB

    monkeypatch.setattr(management, "free_model_pins", give_back)
    buffer = memory().take(3 * MIB)
    assert buffer.pinned
    assert management.TOTAL_PINNED_MEMORY == 3 * MIB


def test_a_refusal_and_a_failure_are_told(
    management: Any, driver: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    ours = memory()
    kept = ours.take(MIB)
    assert kept.pinned
    driver.code = 2
    assert not ours.take(MIB).pinned
    assert "ComfyUI or the system refuses to page-lock 1 MB of RAM beside 1 MB" in caplog.text
    del kept
    assert "1 MB of RAM cannot be unlocked again" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda management, patch: patch.delattr(management, "unpin_memory"),
        lambda management, patch: patch.delattr(management, "TOTAL_PINNED_MEMORY"),
        lambda management, patch: patch.setattr(management, "pin_memory", lambda module, size: True),
        lambda management, patch: patch.setattr(management, "MAX_PINNED_MEMORY", -1),
    ],
)
def test_where_comfyui_has_no_such_functions_the_driver_is_asked(
    change: Callable[[Any, pytest.MonkeyPatch], None],
    management: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from qwenimage_lowvram.nodes.adapters.page_locks import page_locks

    caplog.set_level(logging.DEBUG)
    change(management, monkeypatch)
    assert page_locks() == CudaPageLocks()
    assert "This ComfyUI" in caplog.text


def test_the_loaders_hardware_locks_through_comfyui(management: Any) -> None:
    from qwenimage_lowvram.nodes.adapters.page_locks import ComfyPageLocks
    from qwenimage_lowvram.nodes.devices import hardware_of

    assert hardware_of(torch.device("cuda")).page_locks == ComfyPageLocks()
    assert hardware_of(torch.device("cpu")) == Hardware.detect(torch.device("cpu"))
