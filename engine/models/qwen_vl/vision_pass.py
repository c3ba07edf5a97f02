"""What the vision tower has to do before some prompts are encoded: each set of images is seen once."""

from collections.abc import Callable, Sequence

from ...planning.stages import StagePlan
from ...planning.vision import VisionFootprint, plan_vision, vision_peak_bytes, with_vision
from ...streaming import Waits
from .image_prompts import ImagePrompt
from .images import PatchedImage, SeenImage
from .text_encoder import TextEncoder


class VisionPass:
    """The images of several prompts. Where no prompt shows any, it takes nothing and does nothing.

    Guarantees: prompts that show the same images share one visit of the tower; what a prompt's images are seen as
    depends on that prompt alone, to the last bit.
    """

    def __init__(self, encoder: TextEncoder, prompts: Sequence[ImagePrompt]) -> None:
        """Reads headers only. Raises MissingFile or WrongModel where a prompt shows an image and there is no tower."""
        self._keys = [tuple(image.digest for image in prompt.images) for prompt in prompts]
        self._sets: dict[tuple[str, ...], tuple[PatchedImage, ...]] = {
            key: prompt.images for key, prompt in zip(self._keys, prompts, strict=True) if key
        }
        self._tower = encoder.vision_tower() if self._sets else None
        self._largest = _largest(self._tower.footprint, list(self._sets.values())) if self._tower else []

    @property
    def identity(self) -> str:
        """Of the file that the tower lies in; empty where none is needed."""
        return self._tower.identity if self._tower else ""

    @property
    def blocks(self) -> int:
        """How many will be visited."""
        return self._tower.footprint.blocks * len(self._sets) if self._tower else 0

    @property
    def fetched_bytes(self) -> int:
        return self._tower.fetched_bytes if self._tower else 0

    @property
    def copied_bytes(self) -> int:
        return self._tower.copied_bytes if self._tower else 0

    @property
    def waits(self) -> Waits:
        return self._tower.waits if self._tower else Waits()

    @property
    def wanted_bytes(self) -> int:
        """On the device, from which on more changes nothing."""
        return vision_peak_bytes(self._tower.footprint, self._largest, 2) if self._tower else 0

    def plan(self, limit_bytes: int) -> int:
        """How many slots to look with. Raises DoesNotFit."""
        return plan_vision(self._tower.footprint, self._largest, limit_bytes) if self._tower else 0

    def stage(self, encoding: StagePlan, slots: int) -> StagePlan:
        """The plan of looking and then encoding."""
        if self._tower is None:
            return encoding
        return with_vision(encoding, self._tower.footprint, self._largest, slots)

    def see(self, slots: int, on_block: Callable[[int], None]) -> list[Sequence[SeenImage]]:
        """What each prompt's images are seen as. `on_block` is called before each visit of a block, and may raise."""
        seen: dict[tuple[str, ...], list[SeenImage]] = {}
        if self._tower is not None:
            for key, images in self._sets.items():
                seen[key] = self._tower.see(images, slots=slots, on_block=on_block)
        return [seen.get(key, ()) for key in self._keys]


def _largest(footprint: VisionFootprint, sets: Sequence[Sequence[PatchedImage]]) -> list[int]:
    """Patches of each image of the set that takes most."""
    patches = [[image.height * image.width for image in shown] for shown in sets]
    return max(patches, key=footprint.activation_bytes)
