"""Latents between ComfyUI's layout and the transformer's tokens: a latent pixel is a token."""

from torch import Tensor

from .positions import Shape

TOKEN_PX = 16  # image pixels per token and side
CHANNELS = 64


def pack(latents: Tensor) -> Tensor:
    """(B, 64, H, W) -> tokens (B, H * W, 64), row after row."""
    return latents.flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, H * W, 64) -> (B, 64, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def shape_in_tokens(latents: Tensor) -> Shape:
    """(height, width) of `latents` (B, 64, H, W), as the rotary embedding counts them."""
    return latents.shape[-2], latents.shape[-1]
