"""Node: latents to images with the exact VAE, tile size included."""

from typing import Any

import torch

from .adapters.vae import LowVRAMVAE
from .adapters.value_checks import check_widgets, latent_of
from .display_names import CATEGORY


class QwenLowVRAMDecode:
    """Decode latents; tiles change memory, not the image."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Turns latents into images within the memory limit. With this pack's VAE, tiles are exact: the image is the "
        "same for every tile size, without seams or shifts in tone."
    )
    SEARCH_ALIASES = ("vae decode", "decode latent", "latent to image", "tiled decode", "qwen decode")
    RETURN_TYPES = ("IMAGE", "MASK")
    OUTPUT_TOOLTIPS = (
        "The decoded images, with an alpha channel from models that draw one (Layered, 2.1).",
        "Where the images are transparent, as in Load Image: 1 minus alpha, and 0 for images without alpha.",
    )
    FUNCTION = "decode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "samples": (
                    "LATENT",
                    {"tooltip": "The latents, from Sample (low VRAM), KSampler, or any other sampler."},
                ),
                "vae": ("VAE", {"tooltip": "The VAE. Tiles are exact with the one from this pack's loader."}),
                "tile_size": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 8192,
                        "step": 64,
                        "tooltip": "Maximum tile size: the most pixels of the image that a tile covers along each "
                        "side. 0 picks the largest tiles that fit into memory, or the whole image. Smaller tiles need "
                        "less memory and more time; the image stays the same.",
                    },
                ),
            }
        }

    def decode(self, samples: dict[str, Any], vae: Any, tile_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        check_widgets(self.INPUT_TYPES(), vae=vae, tile_size=tile_size)
        images = _decode(latent_of("samples", samples), vae, tile_size)
        images = images.reshape(-1, *images.shape[-3:])  # a video VAE answers (B, T, H, W, C)
        has_alpha = images.shape[-1] == 4
        return images, 1 - images[..., 3] if has_alpha else images.new_zeros(images.shape[:3])


def _decode(latents: torch.Tensor, vae: Any, tile_size: int) -> torch.Tensor:
    if tile_size == 0:
        return vae.decode(latents)
    tile = max(1, tile_size // vae.spacial_compression_decode())
    if isinstance(vae, LowVRAMVAE):
        return vae.decode_tiled(latents, tile_x=tile, tile_y=tile)
    return vae.decode_tiled(latents, tile_x=tile, tile_y=tile, overlap=tile // 4)
