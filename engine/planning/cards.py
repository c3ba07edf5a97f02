"""Cards as they are sold, and how much of one a model may take before anything of it is known. Imports no torch."""

from dataclasses import dataclass

from .forecast import Speeds
from .request import GIB

REACHED = 0.8  # of what a data sheet promises, by large products and by kernels that wait for memory


@dataclass(frozen=True)
class DataSheet:
    """What is known of a card without it (NVIDIA's data sheets). tflops: of dense products in 16 bits summed in fp32.
    memory_gb: GB/s of its memory. bus_gb: GB/s that page-locked copies reach over its lanes."""

    name: str
    gb: int
    tflops: float
    memory_gb: float
    bus_gb: float

    @property
    def title(self) -> str:
        return f"{self.gb} GB, {self.name}"

    def speeds(self, disk_bytes: float) -> Speeds:
        """With a disk of so many bytes a second."""
        return Speeds(REACHED * self.tflops * 1e12, self.bus_gb * 1e9, disk_bytes, REACHED * self.memory_gb * 1e9)


CARDS = (  # a common one of each size
    DataSheet("RTX 3050 laptop", 4, 11.0, 192, 12),
    DataSheet("RTX 3050", 6, 13.5, 168, 12),
    DataSheet("RTX 4060", 8, 30.2, 272, 12),
    DataSheet("RTX 3080", 10, 59.5, 760, 24),
    DataSheet("RTX 3060", 12, 25.4, 360, 24),
    DataSheet("RTX 4060 Ti", 16, 44.0, 288, 12),
    DataSheet("RTX 3090", 24, 71.0, 936, 24),
)
CARD_OF_GB = {card.gb: card for card in CARDS}
CARDS_GB = tuple(CARD_OF_GB)
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
