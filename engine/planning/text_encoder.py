"""What encoding prompts takes, and with how many slots it fits. Integers in; imports no torch."""

from collections.abc import Sequence

from ..errors import DoesNotFit
from .footprint import TextEncoderFootprint
from .request import GIB


def text_encoder_peak_bytes(footprint: TextEncoderFootprint, prompt_tokens: Sequence[int], slots: int) -> int:
    """What encoding holds on the device: the slots, each prompt's states, and the widest point of a layer:
    in its MLP, or in its attention where that makes scores."""
    unit = footprint.element_bytes
    longest = max(prompt_tokens)
    carried = sum(prompt_tokens) * (footprint.hidden_size + 2 * footprint.head_dim)
    state = longest * footprint.hidden_size * unit
    mlp = 3 * min(longest, footprint.chunk_tokens) * footprint.intermediate_size * unit
    scores = footprint.attention.scratch_bytes(footprint.attended(longest))
    attention = footprint.attention_states * state + scores
    decoding = footprint.staging_bytes + footprint.scratch_bytes
    return slots * footprint.slot_bytes + decoding + carried * unit + max(4 * state + max(mlp, scores), attention)


def plan_text_encoder(footprint: TextEncoderFootprint, prompt_tokens: Sequence[int], limit_bytes: int) -> int:
    """How many slots to encode prompts of these lengths with. Raises DoesNotFit."""
    for slots in (2, 1):
        if text_encoder_peak_bytes(footprint, prompt_tokens, slots) <= limit_bytes:
            return slots
    need = text_encoder_peak_bytes(footprint, prompt_tokens, 1)
    raise DoesNotFit(
        "Encoding prompts of {tokens} tokens needs {need_bytes}, but the limit is {limit_bytes}.\nUse shorter "
        "prompts, or a VRAM limit of {need_gb:.2f} GB or more.",
        code="plan.prompts_do_not_fit",
        tokens=[*map(str, prompt_tokens)],
        need_bytes=need,
        limit_bytes=limit_bytes,
        need_gb=need / GIB + 0.01,
    )
