"""What ComfyUI is about to sample, as a request to be planned for."""

import math

import torch
from torch import Tensor

from ...engine.errors import InvalidRequest
from ...engine.models.qwen_image.latents import LATENT_PX, PATCH, patches_of
from ...engine.models.qwen_image.positions import require_text_positions
from ...engine.models.qwen_image.transformer import QwenImageTransformer
from ...engine.planning.request import SamplingRequest
from .run_conditions import Conds, entries_of, size_of


def request_of(conds: Conds, noise_shape: torch.Size, sigmas: Tensor, joint_attention_dim: int) -> SamplingRequest:
    """What ComfyUI is about to sample: `noise_shape` is (B, 16, F, H, W), and each condition takes a call.

    Raises InvalidRequest for prompts of other models.
    """
    entries = entries_of(conds)
    prompts = [entry["cross_attn"] for entry in entries if entry.get("cross_attn") is not None]
    for prompt in prompts:
        if prompt.shape[-1] != joint_attention_dim:
            raise InvalidRequest(
                "The prompt's embeddings have {dimensions} dimensions, but {needed} are needed.\n\nWhat to do: encode "
                "the prompt with Qwen-Image's own text encoder, Qwen2.5-VL-7B.",
                code="conditioning.other_dimensions",
                dimensions=prompt.shape[-1],
                needed=joint_attention_dim,
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
