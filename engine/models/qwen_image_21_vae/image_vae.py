"""2.1's VAE: the tiles, plans and retries of the 20B models' VAE around other layers."""

from collections.abc import Mapping

import torch

from ...files.checkpoint import Checkpoint, TensorEntry
from ..qwen_image_vae.image_vae import ImageVAE
from .network import build_decoder, build_encoder
from .tensor_names import check_is_image_vae_21, needed_tensors, to_diffusers_names


class ImageVAE21(ImageVAE):
    """Qwen-Image-2.1's VAE: latents (B, 64, h, w) of a sixteenth of the size, images RGBA.

    What diffusers computes, without its video cache; what ImageVAE guarantees holds.
    """

    has_frames = False

    @staticmethod
    def needed(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
        return needed_tensors(checkpoint)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, torch.Tensor], *, dtype: torch.dtype) -> "ImageVAE21":
        """Build from diffusers' or ComfyUI's tensors, which are copied; raises WrongModel for any other VAE."""
        tensors = to_diffusers_names(state_dict)
        check_is_image_vae_21({name: tensor.shape for name, tensor in tensors.items()}, "The VAE")
        return cls(build_encoder(tensors, dtype), build_decoder(tensors, dtype), dtype).eval()
