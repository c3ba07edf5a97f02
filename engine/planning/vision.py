"""What looking at images takes, and with how many slots it fits. Integers in; imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..compute.attention_kernels import FUSED, AttentionKernel, AttentionShape
from ..errors import DoesNotFit
from .forecast import TYPICAL, Speeds, forecast_visit
from .request import GIB
from .stages import Stage, StagePlan


@dataclass(frozen=True)
class VisionFootprint:
    """A vision tower in bytes, block by block; fields are named as in TransformerFootprint.

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


def vision_peak_bytes(footprint: VisionFootprint, patches: Sequence[int], slots: int) -> int:
    """What the tower holds on the device for images of that many patches each: the slots, what lies outside of the
    blocks, and the widest point of a block.

    The factors count the tensors of a patch's width that are alive at once in transformers'
    Qwen2_5_VLVisionAttention, where the rotary embedding is computed in fp32, and around its MLP.
    """
    total, element = sum(patches), footprint.element_bytes
    unit = total * footprint.hidden_size * element
    single = total * footprint.hidden_size * 4
    indices = 24 * total  # which window a patch belongs to, and its row and column
    # sine and cosine in fp32, and the angles, which transformers 4 keeps for as long
    rotary = 4 * footprint.head_dim * 7 // 2
    carried = total * (footprint.patch_values * element + rotary) + unit + indices
    attention = 4 * unit + 4 * single + (2 * single if element < 4 else 0)
    heads, longest = footprint.hidden_size // footprint.head_dim, max(patches)
    scores = footprint.attention.scratch_bytes(AttentionShape(longest, longest, heads, footprint.head_dim))
    mlp = 2 * unit + 3 * total * footprint.intermediate_size * element
    passing = slots * footprint.slot_bytes + footprint.staging_bytes + footprint.scratch_bytes
    return footprint.outside_bytes + passing + carried + max(attention, 8 * unit + scores, mlp)


def plan_vision(footprint: VisionFootprint, patches: Sequence[int], limit_bytes: int) -> int:
    """How many slots to look at images of that many patches with. Raises DoesNotFit."""
    for slots in (2, 1):
        if vision_peak_bytes(footprint, patches, slots) <= limit_bytes:
            return slots
    need = vision_peak_bytes(footprint, patches, 1)
    tokens = " + ".join(str(count // footprint.merge**2) for count in patches)
    raise DoesNotFit(
        "Looking at {count} image{plural} ({tokens} tokens) needs {need_bytes}, the limit is {limit_bytes}.\nUse "
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
    encoding: StagePlan, footprint: VisionFootprint, patches: Sequence[int], slots: int, speeds: Speeds = TYPICAL
) -> StagePlan:
    """The plan of a stage that looks at images before it encodes prompts: the worse moment of both."""
    peak = vision_peak_bytes(footprint, patches, slots)
    passing = slots * footprint.slot_bytes + footprint.staging_bytes + footprint.scratch_bytes
    forecast = forecast_visit(
        tokens=sum(patches),
        weights=footprint.blocks * footprint.slot_bytes / footprint.element_bytes,
        nbytes=footprint.blocks * footprint.stored_bytes,
        host=footprint.host,
        slots=slots,
        speeds=speeds,
    )
    # fp32 patches, then their embeddings
    kept = sum(patches) * (4 * footprint.patch_values + footprint.out_hidden_size * footprint.element_bytes)
    ram = footprint.ring_bytes + footprint.outside_bytes + kept + (peak if footprint.host else 0)
    outside = footprint.outside_bytes
    looking = StagePlan(Stage.ENCODE, outside, passing, peak - passing - outside, ram)
    worse = max(encoding, looking, key=lambda plan: plan.peak_bytes)
    seconds = forecast.seconds + (encoding.seconds or 0.0)
    return replace(worse, ram_bytes=max(encoding.ram_bytes + kept, ram), seconds=seconds)
