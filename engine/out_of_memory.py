"""Tell that memory ran out, of which kind, and in which words: every library has its own error for it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch

from .errors import QwenLowVRAMError
from .host_ram import HostRam

WINDOWS_PAGE_FILE = 1455  # ERROR_COMMITMENT_LIMIT
# Python's words for it, Rust's (in safetensors and tokenizers), torch's, and those of an import that it ended
_OF_PAGE_FILE = (
    f"[WinError {WINDOWS_PAGE_FILE}]",
    f"os error {WINDOWS_PAGE_FILE}",
    f"error code: <{WINDOWS_PAGE_FILE}>",
    "The paging file is too small",
)
_OF_HOST = (
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "bad_alloc",
    "bad allocation",
    "host_allocation_failed",
)
# CUDA, HIP, MPS and XPU say the first; then Intel's drivers, cuBLAS, cuDNN and hipBLAS; MPS of one tensor that is too
# large for it, and DirectML
_OF_DEVICE = (
    "out of memory",
    "out_of_device_memory",
    "out_of_host_memory",
    "out_of_resources",
    "outofmemory",
    "status_alloc_failed",
    "device_allocation_failed",
    "invalid buffer size",
    "not enough gpu video memory",
)


class OutOfMemory(QwenLowVRAMError, torch.OutOfMemoryError):
    """The device's memory ran out, and nothing smaller helped. ComfyUI knows it for what it is, and unloads."""


class OutOfRam(QwenLowVRAMError, MemoryError):
    """The host's memory did. Not torch's error: of that ComfyUI says that the GPU's ran out."""


class Short(Enum):
    """What there was too little of."""

    DEVICE = "device"
    HOST = "host"


def ran_out(when: str, short: Short, why: str) -> OutOfMemory | OutOfRam:
    """The error to raise where nothing smaller helps; `when` goes on after "ran out", `why` is a `reason`."""
    if short is Short.DEVICE:
        return OutOfMemory(
            "The card's memory ran out {when}: {why}.\n\nWhat to do: close other programs that use the card, or set "
            "vram_limit_gb to less than the card has free, and queue the prompt again.",
            code="memory.card_ran_out",
            when=when,
            why=why,
        )
    bound = HostRam.now().tightest
    return OutOfRam(
        "RAM ran out {when}: {why}; {bound} leaves {free_gib:.1f} of {total_gib:.1f} GiB now.\n\nWhat to do: close "
        "other programs, raise the limit named above, or set ram_limit_gb to less than is free, and queue the prompt "
        "again.",
        code="memory.ram_ran_out",
        when=when,
        why=why,
        bound=bound.name,
        free_gib=bound.available_bytes / 2**30,
        total_gib=bound.total_bytes / 2**30,
    )


@contextmanager
def in_words(task: str) -> Iterator[None]:
    """Raise OutOfMemory or OutOfRam where memory runs out within; `task` goes behind "while"."""
    try:
        yield
    except (OutOfMemory, OutOfRam):
        raise
    except Exception as error:
        short = shortage(error)
        if short is None:
            raise
        raise ran_out(f"while {task}", short, reason(error)) from error


def shortage(error: BaseException) -> Short | None:
    """What ran out; None where neither the error nor what caused it is about that."""
    return next((short for cause in _causes(error) if (short := _own_shortage(cause))), None)


def _own_shortage(error: BaseException) -> Short | None:
    if isinstance(error, torch.OutOfMemoryError):
        return Short.DEVICE
    if isinstance(error, MemoryError) or _page_file(error):
        return Short.HOST
    if isinstance(error, OSError):
        return Short.HOST if error.errno == errno.ENOMEM else None
    if not isinstance(error, RuntimeError):
        return None
    text = str(error).lower()
    if any(words in text for words in _OF_HOST):
        return Short.HOST
    return Short.DEVICE if any(words in text for words in _OF_DEVICE) else None


def reason(error: BaseException) -> str:
    """In one line, never empty."""
    error = next((cause for cause in _causes(error) if _own_shortage(cause)), error)
    if _page_file(error):
        return (
            f"Windows has no room left to commit (error {WINDOWS_PAGE_FILE}): the page file is too small. Enlarge it, "
            "or let Windows manage its size"
        )
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from: others word it as an unreadable file, or a failed import."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # code of others may close a circle
        seen.add(id(error))
        yield error
        error = error.__cause__


def _page_file(error: BaseException) -> bool:
    if getattr(error, "winerror", None) == WINDOWS_PAGE_FILE:
        return True
    return any(words in str(error) for words in _OF_PAGE_FILE)
