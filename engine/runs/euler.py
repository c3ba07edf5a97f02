"""Euler's method along a noise schedule: the reference's sampler. Knows no model."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor


def euler(noise: Tensor, sigmas: Tensor, denoised: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """From pure noise at sigmas[0], 1, to the last one. `denoised(x, sigma)`: what the model takes the image for.

    (Karras et al. 2022, algorithm 1 with s = 1 and sigma = t, in fp32 as ComfyUI's and diffusers' samplers.)
    """
    x = noise
    for sigma, following in pairwise(sigmas):
        slope = (x - denoised(x, sigma)) / sigma
        x = x + slope * (following - sigma)
    return x
