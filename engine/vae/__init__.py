"""The exact image VAE: one frame, no feature cache, tiles that equal the untiled picture."""

from .image_vae import ImageVAE
from .keys import RGB, RGBA, needed_tensors, require_image_vae
from .tiles import TilePlan

__all__ = ["RGB", "RGBA", "ImageVAE", "TilePlan", "needed_tensors", "require_image_vae"]
