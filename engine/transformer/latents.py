"""Latents between ComfyUI's layout and the transformer's tokens; the picture sizes that the model can take."""

import torch
from torch import Tensor

from ..errors import InvalidRequest

PATCH = 2  # latent pixels per token and side
LATENT_PX = 8  # picture pixels per latent pixel and side


def pack(latents: Tensor) -> Tensor:
    """(B, C, 1, H, W) -> tokens (B, H/2 * W/2, 4 * C), each a 2x2 patch (diffusers QwenImagePipeline._pack_latents)."""
    b, c, _, h, w = latents.shape
    patches = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, N, 4 * C) of a latent of `height` x `width` -> (B, C, 1, height, width)."""
    b, _, c = tokens.shape
    patches = tokens.reshape(b, height // PATCH, width // PATCH, c // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c // PATCH**2, 1, height, width)


def require_even(latents: Tensor, what: str) -> None:
    """Raise InvalidRequest unless the transformer's patches cover `latents` (..., H, W); `what` names them."""
    height, width = latents.shape[-2:]
    if height % PATCH or width % PATCH:
        step = PATCH * LATENT_PX
        near_w, near_h = (max(step, round(n * LATENT_PX / step) * step) for n in (width, height))
        raise InvalidRequest(
            f"{what} is {width * LATENT_PX}x{height * LATENT_PX} px; width and height must be multiples of {step}.\n"
            f"Use {near_w}x{near_h}; scale a picture to start from before it is encoded."
        )


def shape_in_patches(latents: Tensor) -> tuple[int, int, int]:
    """(frames, height, width) of `latents` (B, C, 1, H, W) in patches, as the rotary embedding counts them."""
    return latents.shape[2], latents.shape[3] // PATCH, latents.shape[4] // PATCH


def patch_norm(latents: Tensor) -> Tensor:
    """The norm of each 2x2 patch over all channels, (B, 1, T, H, W): that of a token of `pack`."""
    b, c, t, h, w = latents.shape
    patches = latents.reshape(b, c, t, h // PATCH, PATCH, w // PATCH, PATCH)
    norm = torch.linalg.vector_norm(patches, dim=(1, 4, 6), keepdim=True)
    return norm.expand(b, 1, t, h // PATCH, PATCH, w // PATCH, PATCH).reshape(b, 1, t, h, w)
