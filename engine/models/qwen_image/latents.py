"""Latents between ComfyUI's layout and the transformer's tokens; the image sizes that the model can take."""

import torch
from torch import Tensor, nn

PATCH = 2  # latent pixels per token and side
LATENT_PX = 8  # image pixels per latent pixel and side


def pack(latents: Tensor) -> Tensor:
    """(B, C, F, H, W) -> tokens (B, F * H/2 * W/2, 4 * C), each a 2x2 patch, frame after frame (diffusers
    QwenImageLayeredPipeline._pack_latents; of one frame, QwenImagePipeline's)."""
    b, c, f, h, w = latents.shape
    patches = latents.reshape(b, c, f, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(b, f * (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack(tokens: Tensor, height: int, width: int, frames: int = 1) -> Tensor:
    """Tokens (B, N, 4 * C) of a latent of `frames` x `height` x `width` -> (B, C, frames, height, width)."""
    b, _, c = tokens.shape
    patches = tokens.reshape(b, frames, height // PATCH, width // PATCH, c // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 4, 1, 2, 5, 3, 6).reshape(b, c // PATCH**2, frames, height, width)


def shape_in_patches(latents: Tensor) -> tuple[int, int, int]:
    """(frames, height, width) of `latents` (B, C, F, H, W) in patches, as the rotary embedding counts them."""
    return latents.shape[2], latents.shape[3] // PATCH, latents.shape[4] // PATCH


def patch_norm(latents: Tensor) -> Tensor:
    """The norm of each 2x2 patch over all channels, (B, 1, T, H, W): that of a token of `pack`; where patches reach
    beyond the latent, of what lies within it."""
    height, width = latents.shape[-2:]
    latents = nn.functional.pad(latents, (0, width % PATCH, 0, height % PATCH))
    b, c, t, h, w = latents.shape
    patches = latents.reshape(b, c, t, h // PATCH, PATCH, w // PATCH, PATCH)
    norm = torch.linalg.vector_norm(patches, dim=(1, 4, 6), keepdim=True)
    spread = norm.expand(b, 1, t, h // PATCH, PATCH, w // PATCH, PATCH).reshape(b, 1, t, h, w)
    return spread[..., :height, :width]


def patches_of(latents: Tensor | torch.Size) -> tuple[int, int]:
    """How many patches, high and wide, cover latents of this shape (..., H, W)."""
    height, width = (latents if isinstance(latents, torch.Size) else latents.shape)[-2:]
    return -(-height // PATCH), -(-width // PATCH)
