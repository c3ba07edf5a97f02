"""Cards as they are sold, and how much of one a model may take before anything of it is known. Imports no torch."""

from .request import GIB

CARDS_GB = (4, 6, 8, 10, 12, 16, 24)
# of a card, before the first tensor: the CUDA context with its kernels, and the image on the screen
CONTEXT_BYTES = 600_000_000
# what the loader keeps free beside Qwen-Image's largest block: a layer of its text encoder in bf16
TYPICAL_HEADROOM_BYTES = 466_115_584


def limit_bytes(card_gb: int, headroom_bytes: int) -> int:
    """What a card of that size leaves to a model, beside the headroom that the loader keeps free."""
    return left_bytes(card_gb * GIB, headroom_bytes)


def left_bytes(capacity_bytes: int, headroom_bytes: int) -> int:
    """Of a card of so many bytes."""
    return max(1, capacity_bytes - CONTEXT_BYTES - headroom_bytes)


def typical_limit_bytes(card_gb: int) -> int:
    """The same for Qwen-Image, in tenths of a GiB, as a person writes it into the loader: 3.0 of 4 GB."""
    return limit_bytes(card_gb, TYPICAL_HEADROOM_BYTES) * 10 // GIB * GIB // 10
