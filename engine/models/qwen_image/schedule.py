"""Qwen-Image's own noise schedule and guidance, as the reference pipeline computes them."""

import math

import torch
from torch import Tensor

from ...errors import InvalidRequest
from .latents import patch_norm

# Qwen-Image's scheduler_config.json: FlowMatchEulerDiscreteScheduler with dynamic exponential shifting
BASE_TOKENS, MAX_TOKENS = 256, 8192
BASE_SHIFT, MAX_SHIFT = 0.5, 0.9
SHIFT_TERMINAL = 0.02

# Qwen-Image-Lightning's scheduler: the same shift for every size, no stretch
LIGHTNING_SHIFT = 3.0

# as ComfyUI's KSampler has them: denoise below 1 makes steps / denoise of them, of which the last are taken
MOST_STEPS, LEAST_DENOISE = 10_000, 0.01


def lightning_sigmas(steps: int, *, denoise: float = 1.0) -> Tensor:
    """The sigmas that Lightning models are distilled for, (steps + 1,) float32; denoise and errors as `qwen_sigmas`."""
    return _shifted(LIGHTNING_SHIFT, steps, denoise)


def qwen_sigmas(steps: int, image_tokens: int, *, denoise: float = 1.0) -> Tensor:
    """The sigmas of `steps` steps for an image of that many tokens, (steps + 1,) float32, from 1 (or less) to 0.

    denoise < 1 keeps the last `steps` of int(steps / denoise) steps, as ComfyUI's KSampler does; steps is then still
    the number of steps taken. Raises InvalidRequest for steps beyond 1 to MOST_STEPS, or denoise below LEAST_DENOISE.
    """
    t = _times(steps, denoise)
    mu = BASE_SHIFT + (image_tokens - BASE_TOKENS) * (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)
    shifted = math.exp(mu) / (math.exp(mu) + 1 / t - 1)
    stretched = 1 - (1 - shifted) * (1 - SHIFT_TERMINAL) / (1 - shifted[-1])
    if len(t) == 1:  # nothing to stretch: the only sigma is 1
        stretched = torch.ones_like(shifted)
    return torch.cat([stretched, stretched.new_zeros(1)]).float()[-(steps + 1) :]


def layered_sigmas(steps: int, image_tokens: int, *, denoise: float = 1.0) -> Tensor:
    """Qwen-Image-Layered's sigmas for layers of that many tokens each, (steps + 1,) float32; denoise and errors as
    `qwen_sigmas`.

    The shift is the square root of the image's tokens in those of 256x256 (diffusers QwenImageLayeredPipeline.
    __call__: mu, as a linear shift), 2.5 at 640x640; no stretch.
    """
    return _shifted(math.sqrt(image_tokens / BASE_TOKENS), steps, denoise)


def _shifted(shift: float, steps: int, denoise: float) -> Tensor:
    t = _times(steps, denoise)
    shifted = shift * t / (1 + (shift - 1) * t)
    return torch.cat([shifted, shifted.new_zeros(1)]).float()[-(steps + 1) :]


def _times(steps: int, denoise: float) -> Tensor:
    """Evenly from 1 to above 0, before any shift."""
    if not (1 <= steps <= MOST_STEPS and denoise >= LEAST_DENOISE):  # nor NaN, which is neither more nor less
        raise InvalidRequest(
            "{steps} steps at denoise {denoise} are not possible. Use 1 to {most_steps} steps, and denoise from "
            "{least_denoise} to 1.",
            code="sampling.wrong_steps",
            steps=steps,
            denoise=denoise,
            most_steps=MOST_STEPS,
            least_denoise=LEAST_DENOISE,
        )
    total = steps if denoise >= 1 else int(steps / denoise)
    return torch.linspace(1, 1 / total, total, dtype=torch.float64)


def true_cfg(cond: Tensor, uncond: Tensor, scale: float, *, rescale: bool) -> Tensor:
    """Guidance on velocities (B, C, 1, H, W); `rescale` gives each token the norm of the conditional prediction.

    (diffusers QwenImagePipeline.__call__: comb_pred, cond_norm, noise_norm.)
    """
    combined = uncond + scale * (cond - uncond)
    if not rescale:
        return combined
    return combined * (patch_norm(cond) / patch_norm(combined))
