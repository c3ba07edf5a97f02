"""Whole images of prompts alone, as Qwen-Image-2.1's reference pipeline makes them (diffusers QwenImage21Pipeline)."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidRequest, Unsupported
from ...planning.request import SamplingRequest
from ..qwen_image_21_vae.latent_statistics import normalised_latents, raw_latents
from ..qwen_vl.image_prompts import ImagePrompt
from ..shown_images import ShownImages
from .branch import Branch
from .latents import CHANNELS, TOKEN_PX, pack, shape_in_tokens, unpack
from .prefix import Prefix
from .schedule import guided, reference_sigmas
from .sizes import STEP_PX
from .transformer import QwenImage21Transformer


class QwenImage21FromPrompts:
    """As `family.FromPrompts`; latents are (B, 64, h, w) in fp32."""

    side_px = STEP_PX

    def noise_shape(self, batch: int, width: int, height: int) -> tuple[int, ...]:
        return (batch, CHANNELS, height // TOKEN_PX, width // TOKEN_PX)

    def prompt_dim(self, transformer: QwenImage21Transformer) -> int:
        return transformer.config.prompt_dim

    def require_noise(self, noise: Tensor) -> None:
        if noise.ndim != 4 or noise.shape[1] != CHANNELS or 0 in noise.shape:
            raise InvalidRequest(
                "The noise has the shape {shape}; (B, {channels}, h, w) is needed.",
                code="run_21.wrong_noise",
                shape=list(noise.shape),
                channels=CHANNELS,
            )

    def show(self, images: Sequence[Tensor], member: Any, size: tuple[int, int], megapixels: float) -> ShownImages:
        raise Unsupported(
            "{model} can be shown images only with the nodes in ComfyUI.\n\nWhat to do: leave the images out, or use "
            "Qwen-Image-Edit-2511.",
            code="run_21.no_images",
            model=member.value,
        )

    def prompt(self, tokenizer: Any, text: str, shown: ShownImages) -> ImagePrompt:
        return ImagePrompt(tuple(tokenizer.encode(text)))

    def normalised(self, raw: Tensor) -> Tensor:
        return normalised_latents(raw)

    def request(
        self,
        transformer: QwenImage21Transformer,
        prompts: Sequence[Tensor],
        noise: Tensor,
        steps: int,
        references: Sequence[Tensor] = (),
    ) -> SamplingRequest:
        return SamplingRequest(
            width=noise.shape[-1] * TOKEN_PX,
            height=noise.shape[-2] * TOKEN_PX,
            branches=len(prompts) * len(noise),
            prompt_tokens=max(prompt.shape[1] for prompt in prompts),
            timesteps=steps,
            token_px=TOKEN_PX,
            prompts=len(prompts),
        )

    def sigmas(self, transformer: QwenImage21Transformer, steps: int, noise: Tensor) -> Tensor:
        return reference_sigmas(transformer.variant, steps, prod(shape_in_tokens(noise)))

    def branch(self, latent: Tensor, prompt: Tensor, sigma: float, references: Sequence[Tensor] = ()) -> Branch:
        return Branch(pack(latent), shape_in_tokens(latent), Prefix(prompt), sigma)

    def velocity(self, answers: Sequence[Tensor], noise: Tensor) -> Tensor:
        return unpack(torch.cat(list(answers)).float(), *noise.shape[-2:])

    def guided(self, positive: Tensor, negative: Tensor, cfg: float) -> Tensor:
        return guided(positive, negative, cfg)

    def raw(self, latents: Tensor) -> Tensor:
        return raw_latents(latents)
