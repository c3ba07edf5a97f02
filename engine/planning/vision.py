"""What looking at images takes, and with how many slots it fits. Integers in; imports no torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..compute.attention_kernels import FUSED, AttentionKernel
from ..errors import DoesNotFit
from .forecast import Speeds, forecast_visit
from .request import GIB
from .stages import Stage, StagePlan


@dataclass(frozen=True)
class VisionFootprint(ABC):
    """A vision tower in bytes, block by block; fields are named as in TransformerFootprint. Each tower has its own,
    which says what its passes take.

    patch_values: numbers of a patch. merge: patches of each token along each side. out_hidden_size: of a token.
    """

    blocks: int
    slot_bytes: int
    staging_bytes: int
    scratch_bytes: int
    stored_bytes: int
    ring_bytes: int
    host: bool
    outside_bytes: int
    patch_values: int
    hidden_size: int
    intermediate_size: int
    head_dim: int
    merge: int
    out_hidden_size: int
    element_bytes: int
    attention: AttentionKernel = FUSED
    decode_bytes: int = 0
    decode_launches: int = 0

    @abstractmethod
    def activation_bytes(self, patches: Sequence[int]) -> int:
        """Peak of a pass beyond weights, for images of that many patches each."""

    @property
    @abstractmethod
    def seen_bytes(self) -> int:
        """What the language model sees of a patch."""


def vision_peak_bytes(footprint: VisionFootprint, patches: Sequence[int], slots: int) -> int:
    """What the tower holds on the device for images of that many patches each: the slots, what lies outside of the
    blocks, and the images' activations."""
    passing = slots * footprint.slot_bytes + footprint.staging_bytes + footprint.scratch_bytes
    return footprint.outside_bytes + passing + footprint.activation_bytes(patches)


def plan_vision(footprint: VisionFootprint, patches: Sequence[int], limit_bytes: int) -> int:
    """How many slots to look at images of that many patches with. Raises DoesNotFit."""
    for slots in (2, 1):
        if vision_peak_bytes(footprint, patches, slots) <= limit_bytes:
            return slots
    need = vision_peak_bytes(footprint, patches, 1)
    tokens = " + ".join(str(count // footprint.merge**2) for count in patches)
    raise DoesNotFit(
        "Looking at {count} image{plural} ({tokens} tokens) needs {need_bytes}, but the limit is {limit_bytes}.\nUse "
        "fewer or smaller images, or a VRAM limit of {need_gb:.2f} GB or more.",
        code="plan.images_do_not_fit",
        count=len(patches),
        plural="s" if len(patches) != 1 else "",
        tokens=tokens,
        need_bytes=need,
        limit_bytes=limit_bytes,
        need_gb=need / GIB + 0.01,
    )


def with_vision(
    encoding: StagePlan, footprint: VisionFootprint, patches: Sequence[int], slots: int, speeds: Speeds | None = None
) -> StagePlan:
    """The plan of a stage that looks at images before it encodes prompts: the worse moment of both."""
    peak = vision_peak_bytes(footprint, patches, slots)
    passing = slots * footprint.slot_bytes + footprint.staging_bytes + footprint.scratch_bytes
    kept = sum(patches) * (4 * footprint.patch_values + footprint.seen_bytes)  # fp32 patches, then their embeddings
    ram = footprint.ring_bytes + footprint.outside_bytes + kept + (peak if footprint.host else 0)
    outside = footprint.outside_bytes
    looking = StagePlan(Stage.ENCODE, outside, passing, peak - passing - outside, ram)
    worse = max(encoding, looking, key=lambda plan: plan.peak_bytes)
    seconds = None
    if speeds is not None and encoding.seconds is not None:
        visit = forecast_visit(footprint, footprint.blocks, tokens=sum(patches), slots=slots, speeds=speeds)
        seconds = encoding.seconds + visit.seconds
    return replace(worse, ram_bytes=max(encoding.ram_bytes + kept, ram), seconds=seconds)
