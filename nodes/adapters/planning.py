"""What ComfyUI is about to sample, and the plan for it within what the person and the machine allow."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...engine.errors import InvalidRequest
from ...engine.models.qwen_image.latents import LATENT_PX, PATCH, patches_of
from ...engine.models.qwen_image.positions import require_text_positions
from ...engine.models.qwen_image.transformer import QwenImageTransformer
from ...engine.planning.block_split import annex_bytes, split_blocks
from ...engine.planning.memory import MemoryPlan, least_bytes, least_ram_bytes, most_bytes, most_ram_bytes, plan_memory
from ...engine.planning.request import Limits, SamplingRequest
from ...engine.runs.free_memory import check_room
from ...engine.runs.known_speeds import KnownSpeeds
from .limits import host_bytes, stage_bytes
from .patcher import LowVRAMPatcher
from .run_conditions import Conds, entries_of, size_of
from .shortage import loader_limit


def request_of(conds: Conds, noise_shape: torch.Size, sigmas: Tensor, joint_attention_dim: int) -> SamplingRequest:
    """What ComfyUI is about to sample: `noise_shape` is (B, 16, F, H, W), and each condition takes a call.

    Raises InvalidRequest for prompts of other models.
    """
    entries = entries_of(conds)
    prompts = [entry["cross_attn"] for entry in entries if entry.get("cross_attn") is not None]
    for prompt in prompts:
        if prompt.shape[-1] != joint_attention_dim:
            raise InvalidRequest(
                f"The prompt's embeddings have {prompt.shape[-1]} dimensions, {joint_attention_dim} are needed.\n\n"
                "What to do: encode the prompt with Qwen-Image's own text encoder, Qwen2.5-VL-7B."
            )
    high, wide = patches_of(noise_shape)
    references = [
        sum(math.prod(patches_of(latent)) for latent in entry.get("reference_latents") or ()) for entry in entries
    ]
    return SamplingRequest(
        width=wide * PATCH * LATENT_PX,
        height=high * PATCH * LATENT_PX,
        branches=max(1, len(entries)) * noise_shape[0],
        prompt_tokens=max((prompt.shape[1] for prompt in prompts), default=0),
        reference_tokens=max(references, default=0),
        timesteps=max(1, len(sigmas) - 1),
        frames=noise_shape[2],
    )


def check_positions(conds: Conds, noise_shape: torch.Size, transformer: QwenImageTransformer) -> None:
    """Raise InvalidRequest for prompts that are too long beside their image: before anything is loaded."""
    layered = transformer.config.use_layer3d_rope
    for entry in entries_of(conds):
        sizes = [size_of(entry, noise_shape), *(latent.shape[-2:] for latent in entry.get("reference_latents") or ())]
        shapes = [(noise_shape[2], *patches_of(torch.Size(size))) for size in sizes]
        require_text_positions(shapes, entry["cross_attn"].shape[1], transformer.positions, layered=layered)


def plan_run(
    transformer: QwenImageTransformer,
    request: SamplingRequest,
    limit_bytes: int | None,
    ram_limit_bytes: int | None,
    patcher: LowVRAMPatcher,
    speeds: KnownSpeeds,
    *,
    beside: Sequence[ModelPatcher] = (),
) -> MemoryPlan:
    """`beside`: ControlNets and model patches, which the request counts. Raises DoesNotFit before anything is
    loaded."""
    footprint = transformer.footprint
    steps = request.timesteps
    check_room(steps * footprint.row_bytes, f"The modulation of {steps} steps", "Use fewer steps.")
    most = most_bytes(footprint, request)
    vram = stage_bytes(transformer.hardware.device, limit_bytes, most, reused=patcher, beside=beside)
    ram: int | None = ram_limit_bytes  # where the device is the host, what is free there is counted already
    if not footprint.host:
        least = least_ram_bytes(footprint, request)
        unified = transformer.hardware.unified
        ram = host_bytes(transformer, ram_limit_bytes, least if unified else most_ram_bytes(footprint, request), least)
        if unified:  # the device's memory is the host's too: what is free must not be given out twice
            ram = min(ram, least)
    # RAM is short only where a limit is set, and the message names that
    enough = vram >= least_bytes(footprint, request)
    short = nullcontext() if enough else loader_limit(limit_bytes).naming(transformer.hardware.device, vram)
    annexes = split_blocks(footprint, request, vram, _other_budgets(transformer, request, limit_bytes))
    with short:
        return plan_memory(footprint, request, Limits(vram, ram), speeds.get(), annexes)


def _other_budgets(
    transformer: QwenImageTransformer, request: SamplingRequest, limit_bytes: int | None
) -> list[tuple[str, int]]:
    """What may be held on each of the model's further devices."""
    wanted = annex_bytes(transformer.footprint, request, transformer.footprint.blocks)
    budgets = []
    for name, store in transformer.annexes.items():
        held = store.resident_bytes  # ComfyUI does not know of it: what it calls free is beside it
        free = stage_bytes(torch.device(name), limit_bytes, wanted - held) + held
        budgets.append((name, free if limit_bytes is None else min(free, limit_bytes)))
    return budgets
