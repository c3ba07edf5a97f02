"""Decide where each block lives. Integers in, a MemoryPlan out; imports no torch.

Guarantees: no stage's predicted peak is above the limit; every block is resident or streamed, once; what is refused
does not fit, and what the refusal suggests does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .errors import DoesNotFit, InvalidRequest
from .footprint import TextEncoderFootprint, TransformerFootprint

GIB = 1024**3
PATCH_PX = 16  # a token is 2x2 latent pixels of 8x8 picture pixels
# in the order in which they are tried; below 512 tokens a GPU is no longer filled
MLP_CHUNKS = (None, 4096, 2048, 1024, 512)
# the sizes that the model was trained on (model card), largest first, and smaller ones to fall back to
SUGGESTED_SIZES = ((1328, 1328), (1664, 928), (1024, 1024), (768, 768), (512, 512))


@dataclass(frozen=True)
class SamplingRequest:
    """What one step has to compute.

    width, height: of the picture in px. branches: prompts times pictures that run through a block in turn.
    prompt_tokens: of the longest prompt. reference_tokens: of all reference pictures of a branch together.
    """

    width: int
    height: int
    branches: int
    prompt_tokens: int
    reference_tokens: int = 0

    def __post_init__(self) -> None:
        if self.width % PATCH_PX or self.height % PATCH_PX or min(self.width, self.height) < PATCH_PX:
            nearest = [max(PATCH_PX, round(n / PATCH_PX) * PATCH_PX) for n in (self.width, self.height)]
            raise InvalidRequest(
                f"A picture of {self.width}x{self.height} px cannot be made: width and height must be multiples of "
                f"{PATCH_PX}. Use {nearest[0]}x{nearest[1]}."
            )

    @property
    def image_tokens(self) -> int:
        return (self.width // PATCH_PX) * (self.height // PATCH_PX) + self.reference_tokens

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.branches} branch{'es' if self.branches != 1 else ''}"


@dataclass(frozen=True)
class MemoryPlan:
    """Where the transformer's blocks live during a run, and what that takes on the device.

    resident: indices of the blocks that stay. slots: buffers that the others pass through (two overlap reading with
    computing). mlp_chunk_tokens: None computes the MLP of all tokens at once. The *_peak_bytes are predictions of
    everything that the stage holds on the device.
    """

    request: SamplingRequest
    limit_bytes: int
    blocks: int
    resident: tuple[int, ...]
    slots: int
    mlp_chunk_tokens: int | None
    resident_bytes: int
    activation_bytes: int
    sampling_peak_bytes: int
    modulation_peak_bytes: int
    late_timestep_peak_bytes: int
    streamed_bytes_per_step: int

    @property
    def peak_bytes(self) -> int:
        return max(self.sampling_peak_bytes, self.modulation_peak_bytes, self.late_timestep_peak_bytes)

    @property
    def streamed(self) -> int:
        """How many blocks are fetched per step."""
        return self.blocks - len(self.resident)

    def __repr__(self) -> str:
        chunk = f", MLP in chunks of {self.mlp_chunk_tokens} tokens" if self.mlp_chunk_tokens else ""
        slots = f"{self.slots} slot{'s' if self.slots != 1 else ''}"
        return (
            f"MemoryPlan({self.request}: {len(self.resident)} of {self.blocks} blocks resident, {self.streamed} "
            f"streamed through {slots}, {size_text(self.streamed_bytes_per_step)} per step{chunk}; "
            f"peak {size_text(self.peak_bytes)} of {size_text(self.limit_bytes)}: "
            f"weights {size_text(self.resident_bytes)}, activations {size_text(self.activation_bytes)})"
        )


def plan_memory(footprint: TransformerFootprint, request: SamplingRequest, limit_bytes: int) -> MemoryPlan:
    """The fastest plan within the limit: two slots where they fit, then the most resident blocks, then the least
    chunking (chunks of MLP_CHUNKS cost next to nothing, a block that is fetched costs its bytes at every step).

    Raises DoesNotFit with what would fit.
    """
    for slots in (2, 1):
        plans = [_most_resident(footprint, request, limit_bytes, slots, chunk) for chunk in MLP_CHUNKS]
        fitting = [plan for plan in plans if plan is not None]
        if fitting:
            return max(fitting, key=lambda plan: len(plan.resident))  # the first of equals
    raise DoesNotFit(_refusal(footprint, request, limit_bytes))


def least_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    """The smallest limit that `plan_memory` accepts."""
    # few small blocks that are all resident need no staging, and may take less than a slot beside them
    ways = (((), 1), (range(footprint.blocks), 0 if footprint.native else 1))
    return min(
        _plan(footprint, request, 0, resident, slots, chunk).peak_bytes
        for resident, slots in ways
        for chunk in MLP_CHUNKS
    )


def most_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    """The limit from which on more memory changes nothing: everything resident."""
    slots = 0 if footprint.native else 2
    return _plan(footprint, request, 0, range(footprint.blocks), slots, None).peak_bytes


def activation_bytes(footprint: TransformerFootprint, request: SamplingRequest, chunk: int | None) -> int:
    """Peak of a forward pass beyond weights.

    The factors count the tensors of one token's width that are alive at once in diffusers'
    QwenImageTransformerBlock: in the joint attention (q, k, v, rotary embedding in fp32), and around the two MLPs,
    whose hidden width is four times the model's, before and after GELU.
    """
    unit = footprint.inner_dim * footprint.element_bytes
    image, text = request.image_tokens * unit, request.prompt_tokens * unit
    tokens = request.image_tokens + request.prompt_tokens
    rotary = tokens * footprint.head_dim // 2 * 8  # complex64
    inputs = (request.image_tokens * 64 + request.prompt_tokens * footprint.joint_attention_dim) * (
        footprint.element_bytes
    )
    carried = image + text + rotary + inputs
    attention = 10 * (image + text)
    wide_image, wide_text = (
        8 * n if chunk is None or n <= chunk * unit else n + 8 * chunk * unit for n in (image, text)
    )
    mlps = max(6 * image + 4 * text + wide_image, 7 * image + 6 * text + wide_text)
    return request.branches * carried + max(attention, mlps)


def text_encoder_peak_bytes(footprint: TextEncoderFootprint, prompt_tokens: Sequence[int], slots: int) -> int:
    """What encoding holds on the device: the slots, each prompt's states, and the widest point of a layer's MLP."""
    unit = footprint.element_bytes
    longest = max(prompt_tokens)
    carried = sum(prompt_tokens) * (footprint.hidden_size + 2 * footprint.head_dim)
    widest = (
        4 * longest * footprint.hidden_size + 3 * min(longest, footprint.chunk_tokens) * footprint.intermediate_size
    )
    decoding = footprint.staging_bytes + footprint.scratch_bytes
    return slots * footprint.slot_bytes + decoding + (carried + widest) * unit


def plan_text_encoder(footprint: TextEncoderFootprint, prompt_tokens: Sequence[int], limit_bytes: int) -> int:
    """How many slots to encode prompts of these lengths with. Raises DoesNotFit."""
    for slots in (2, 1):
        if text_encoder_peak_bytes(footprint, prompt_tokens, slots) <= limit_bytes:
            return slots
    need = text_encoder_peak_bytes(footprint, prompt_tokens, 1)
    raise DoesNotFit(
        f"Encoding prompts of {', '.join(map(str, prompt_tokens))} tokens needs {size_text(need)}, the limit is "
        f"{size_text(limit_bytes)}.\nUse shorter prompts, or a VRAM limit of {need / GIB + 0.01:.2f} GB or more."
    )


def size_text(nbytes: int) -> str:
    """Bytes as a person reads them: 1.58 GiB, 81.0 MiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 1024**2:.1f} MiB"


def _most_resident(
    footprint: TransformerFootprint, request: SamplingRequest, limit_bytes: int, slots: int, chunk: int | None
) -> MemoryPlan | None:
    everything = range(footprint.blocks)
    whole = _plan(footprint, request, limit_bytes, everything, 0 if footprint.native else slots, chunk)
    if whole.peak_bytes <= limit_bytes:
        return whole
    spare = limit_bytes - _plan(footprint, request, limit_bytes, (), slots, chunk).peak_bytes
    if spare < 0:
        return None
    count = min(spare // footprint.resident_block_bytes, footprint.blocks - 1)
    return _plan(footprint, request, limit_bytes, _spread(count, footprint.blocks), slots, chunk)


def _plan(
    footprint: TransformerFootprint,
    request: SamplingRequest,
    limit_bytes: int,
    resident: Iterable[int],
    slots: int,
    chunk: int | None,
) -> MemoryPlan:
    indices = tuple(resident)
    resident_bytes = footprint.outside_bytes + len(indices) * footprint.resident_block_bytes
    activations = activation_bytes(footprint, request, chunk)
    staging = 0 if len(indices) == footprint.blocks else footprint.staging_bytes
    table_row = footprint.blocks * 12 * footprint.inner_dim * footprint.element_bytes
    modulation = footprint.modulation_slot_bytes
    modulation_decoding = footprint.modulation_staging_bytes + footprint.modulation_scratch_bytes
    run = resident_bytes + slots * footprint.slot_bytes + staging + footprint.scratch_bytes
    return MemoryPlan(
        request=request,
        limit_bytes=limit_bytes,
        blocks=footprint.blocks,
        resident=indices,
        slots=slots,
        mlp_chunk_tokens=chunk,
        resident_bytes=resident_bytes,
        activation_bytes=activations,
        sampling_peak_bytes=run + table_row + activations,
        modulation_peak_bytes=resident_bytes + 2 * modulation + modulation_decoding + table_row,
        # a timestep that was not announced is computed before a pass, beside the slots
        late_timestep_peak_bytes=run + modulation + modulation_decoding + table_row,
        streamed_bytes_per_step=(footprint.blocks - len(indices)) * footprint.stored_bytes,
    )


def _spread(count: int, blocks: int) -> tuple[int, ...]:
    """`count` of `blocks` indices, evenly, beginning with the first: every fetch has computing to hide behind."""
    return tuple(i for i in range(blocks) if i * count // blocks != (i - 1) * count // blocks)


def _refusal(footprint: TransformerFootprint, request: SamplingRequest, limit_bytes: int) -> str:
    need = least_bytes(footprint, request)
    ways = []
    fewer = next(
        (n for n in range(request.branches - 1, 0, -1) if _fits(footprint, replace(request, branches=n), limit_bytes)),
        None,
    )
    if fewer is not None:
        ways.append(f"a smaller batch or no guidance ({fewer} instead of {request.branches} branches)")
    for width, height in SUGGESTED_SIZES:
        smaller = replace(request, width=width, height=height)
        if width * height < request.width * request.height and _fits(footprint, smaller, limit_bytes):
            ways.append(f"{width}x{height} ({size_text(least_bytes(footprint, smaller))})")
            break
    ways.append(f"a VRAM limit of {need / GIB + 0.01:.2f} GB or more")
    return (
        f"Sampling needs {size_text(need)} at least, the limit is {size_text(limit_bytes)} ({request}).\n"
        f"Use {', or '.join(ways)}."
    )


def _fits(footprint: TransformerFootprint, request: SamplingRequest, limit_bytes: int) -> bool:
    return least_bytes(footprint, request) <= limit_bytes
