"""What a vision tower does for its text encoder, whichever version: images to what the language model sees."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from ...planning.vision import VisionFootprint
from ...streaming import VisitsBlocks
from .images import PatchedImage, SeenImage


class VisionTower(VisitsBlocks, ABC):
    """The vision part of a text encoder.

    Guarantees: all images are seen in one visit of each block; on the device lie at most `slots` blocks, what is
    outside of the blocks and the images' activations; nothing stays on the device, and no file open, when `see`
    returns or raises.
    """

    identity: str  # of the file that holds it
    footprint: VisionFootprint

    @abstractmethod
    def see(
        self, images: Sequence[PatchedImage], *, slots: int = 2, on_block: Callable[[int], None] | None = None
    ) -> list[SeenImage]:
        """`on_block` is called before each block with its index, and may raise."""
