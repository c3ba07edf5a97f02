"""Noise schedules of Qwen-Image-2.1 and 2.1-Turbo, and guidance, as the reference pipeline computes them."""

import torch
from torch import Tensor

from ...errors import InvalidRequest
from ..qwen_image.schedule import LEAST_DENOISE, qwen_sigmas
from .variants import Variant21

STEPS, CFG = 40, 1.0  # the reference's own
# of 2.1-Turbo, as its pipeline states them: to be taken as they are
TURBO_SIGMAS = (1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568)


def sigmas_21(steps: int, image_tokens: int, *, denoise: float = 1.0) -> Tensor:
    """The sigmas of `steps` steps for an image of that many tokens, (steps + 1,) float32, from 1 (or less) to 0.

    The schedule is the one of the 20B models: the shift follows the number of tokens of the image that is made, and the
    last sigma is 0.02. denoise and errors as `qwen_sigmas`.
    """
    return qwen_sigmas(steps, image_tokens, denoise=denoise)


def turbo_sigmas(*, denoise: float = 1.0) -> Tensor:
    """2.1-Turbo's eight sigmas and 0, (9,) float32; denoise below 1 keeps so large a part of the steps, at least one,
    from the end. Raises InvalidRequest for denoise beyond LEAST_DENOISE to 1."""
    if not LEAST_DENOISE <= denoise <= 1:
        raise InvalidRequest(
            "Denoise {denoise} is not possible. Use {least_denoise} to 1.",
            code="sampling_21.wrong_denoise",
            denoise=denoise,
            least_denoise=LEAST_DENOISE,
        )
    kept = max(1, round(len(TURBO_SIGMAS) * denoise))
    return torch.tensor([*TURBO_SIGMAS[-kept:], 0.0], dtype=torch.float32)


def reference_sigmas(variant: Variant21, steps: int, image_tokens: int, *, denoise: float = 1.0) -> Tensor:
    """What the reference takes for a model. Raises InvalidRequest for other steps than Turbo's."""
    if not variant.is_turbo:
        return sigmas_21(steps, image_tokens, denoise=denoise)
    sigmas = turbo_sigmas(denoise=denoise)
    if steps != len(sigmas) - 1:
        raise InvalidRequest(
            "{variant} was made for {turbo_steps} steps with its own sigmas; this run has {steps} at denoise "
            "{denoise}.\n\nWhat to do: set steps to {turbo_steps}; for another number of steps, use {base}.",
            code="sampling_21.turbo_steps",
            variant=variant.value,
            turbo_steps=len(sigmas) - 1,
            steps=steps,
            denoise=denoise,
            base=Variant21.BASE.value,
        )
    return sigmas


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Guidance on velocities. Nothing is rescaled: the reference has no such step for this model (diffusers
    QwenImage21Pipeline.__call__)."""
    return uncond + scale * (cond - uncond)
