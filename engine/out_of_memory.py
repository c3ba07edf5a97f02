"""Tell that memory ran out, of which kind, and in which words: every library has its own error for it."""

import errno
from enum import Enum

import torch

WINDOWS_PAGE_FILE = 1455  # ERROR_COMMITMENT_LIMIT
_OF_HOST = ("can't allocate memory", "not enough memory", "cannot allocate memory", "bad_alloc", "bad allocation")
# CUDA, HIP, MPS and XPU say the first; then Intel's drivers, cuBLAS, cuDNN and hipBLAS
_OF_DEVICE = (
    "out of memory",
    "out_of_device_memory",
    "out_of_host_memory",
    "out_of_resources",
    "outofmemory",
    "status_alloc_failed",
)


class OutOfMemory(torch.OutOfMemoryError):
    """Memory ran out, and no smaller plan helped. ComfyUI knows it for what it is, and unloads."""


class Short(Enum):
    """What there was too little of."""

    DEVICE = "device"
    HOST = "host"


def shortage(error: BaseException) -> Short | None:
    """What ran out; None where the error is about something else."""
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
    if _page_file(error):
        return (
            f"Windows has no room left to commit (error {WINDOWS_PAGE_FILE}): the page file is too small. Enlarge it, "
            "or let Windows manage its size"
        )
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def _page_file(error: BaseException) -> bool:
    if getattr(error, "winerror", None) == WINDOWS_PAGE_FILE:
        return True
    # Rust's words for it, in safetensors and tokenizers; and torch's
    return f"os error {WINDOWS_PAGE_FILE}" in str(error) or f"error code: <{WINDOWS_PAGE_FILE}>" in str(error)
