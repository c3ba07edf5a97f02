"""How the VAE's latents spread: the transformer sees them normalised. All VAEs of the family share these numbers."""

import torch
from torch import Tensor

# of each of the 16 channels (Qwen-Image's vae/config.json: latents_mean, latents_std)
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def raw_latents(normalised: Tensor) -> Tensor:
    """(B, 16, F, h, w) as the transformer makes them -> as the VAE decodes them."""
    return normalised * _as(LATENTS_STD, normalised) + _as(LATENTS_MEAN, normalised)


def normalised_latents(raw: Tensor) -> Tensor:
    """The other way round."""
    return (raw - _as(LATENTS_MEAN, raw)) / _as(LATENTS_STD, raw)


def _as(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
