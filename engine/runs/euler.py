"""Euler's method along a noise schedule: the reference's sampler. Knows no model."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor


def euler(noise: Tensor, sigmas: Tensor, denoised: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    """From pure noise at sigmas[0], 1, to the last one; sigmas lie on the host. `denoised(x, sigma, value)`: what the
    model takes the image for; sigma lies where the noise does, and its value is known to the host.

    (Karras et al. 2022, algorithm 1 with s = 1 and sigma = t, in fp32 as ComfyUI's and diffusers' samplers.)
    """
    x = noise
    # on the device too: divided by a number of the host's, torch would multiply with its reciprocal
    steps = zip(pairwise(sigmas.to(noise.device)), sigmas[:-1].tolist(), strict=True)
    for (sigma, following), value in steps:
        slope = (x - denoised(x, sigma, value)) / sigma
        x = x + slope * (following - sigma)
    return x
