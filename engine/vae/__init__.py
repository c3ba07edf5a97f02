"""The exact image VAE: one frame, no feature cache, tiles that equal the untiled picture."""

from .image_vae import ImageVAE
from .tiles import TilePlan

__all__ = ["ImageVAE", "TilePlan"]
