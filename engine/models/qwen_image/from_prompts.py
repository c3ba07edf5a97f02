"""Whole images of prompts alone, as Qwen-Image's reference pipeline makes them (diffusers QwenImagePipeline)."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ...compute.link import TYPICAL_LINK
from ...errors import InvalidRequest
from ...planning.request import SamplingRequest
from ..qwen_image_vae.latent_statistics import raw_latents
from .branch import Branch
from .latents import LATENT_PX, PATCH, pack, patches_of, shape_in_patches, unpack
from .positions import require_text_positions
from .schedule import qwen_sigmas, true_cfg
from .transformer import QwenImageTransformer

LATENT_CHANNELS = 16


class QwenImageFromPrompts:
    """As `family.FromPrompts`; latents are (B, 16, 1, h, w) in fp32."""

    side_px = PATCH * LATENT_PX

    def noise_shape(self, batch: int, width: int, height: int) -> tuple[int, ...]:
        return (batch, LATENT_CHANNELS, 1, height // LATENT_PX, width // LATENT_PX)

    def prompt_dim(self, transformer: QwenImageTransformer) -> int:
        return transformer.config.joint_attention_dim

    def require_noise(self, noise: Tensor) -> None:
        if noise.ndim != 5 or noise.shape[2] != 1 or 0 in noise.shape or noise.shape[-1] % 2 or noise.shape[-2] % 2:
            raise InvalidRequest(
                "The noise has the shape {shape}; (B, 16, 1, h, w) is needed, with even h and w: the image's sides "
                "must be multiples of 16 px.",
                code="run.wrong_noise",
                shape=list(noise.shape),
            )

    def request(
        self, transformer: QwenImageTransformer, prompts: Sequence[Tensor], noise: Tensor, steps: int
    ) -> SamplingRequest:
        for prompt in prompts:
            require_text_positions([shape_in_patches(noise)], prompt.shape[1], transformer.positions, layered=False)
        ranks = transformer.ranks
        return SamplingRequest(
            width=noise.shape[-1] * LATENT_PX,
            height=noise.shape[-2] * LATENT_PX,
            branches=len(prompts) * len(noise),
            prompt_tokens=max(prompt.shape[1] for prompt in prompts),
            timesteps=steps,
            ranks=1 if ranks is None else ranks.count,
            link=TYPICAL_LINK if ranks is None else ranks.link,
        )

    def sigmas(self, transformer: QwenImageTransformer, steps: int, noise: Tensor) -> Tensor:
        return qwen_sigmas(steps, prod(patches_of(noise)))

    def branch(self, latent: Tensor, prompt: Tensor, sigma: float) -> Branch:
        return Branch(pack(latent), (shape_in_patches(latent),), prompt, None, sigma)

    def velocity(self, answers: Sequence[Tensor], noise: Tensor) -> Tensor:
        return unpack(torch.cat(list(answers)).float(), *noise.shape[-2:])

    def guided(self, positive: Tensor, negative: Tensor, cfg: float) -> Tensor:
        return true_cfg(positive, negative, cfg, rescale=True)

    def raw(self, latents: Tensor) -> Tensor:
        return raw_latents(latents)
