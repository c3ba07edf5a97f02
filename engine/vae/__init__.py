"""The exact image VAE: one frame, no feature cache, tiles that equal the untiled picture."""

from .image_vae import ImageVAE
from .keys import require_image_vae
from .tiles import TilePlan

__all__ = ["ImageVAE", "TilePlan", "require_image_vae"]
