"""The exact VAE as ComfyUI's VAE object: native nodes decode and encode with it. Translates; decides nothing."""

from collections.abc import Callable
from typing import Any, NoReturn

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from ...engine.errors import InvalidRequest, Unsupported
from ...engine.files.checkpoint import Checkpoint
from ...engine.hardware import Hardware
from ...engine.models.qwen_image_vae.image_vae import ImageVAE
from ...engine.out_of_memory import in_words
from ...engine.runs.decode import VaeRun
from ...engine.runs.free_memory import check_room
from ...engine.runs.timeline import Timeline
from .error_events import errors_sent
from .in_comfyui import InComfyUI
from .limit_names import VRAM_LIMIT, loader_limit
from .progress import executing_prompt_id
from .value_checks import check_image, check_latent, check_number

_FEWER = "Decode fewer at a time (LatentFromBatch), or smaller ones."


def make_vae(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    limit_bytes: int | None,
    device: torch.device | None = None,
    timeline: Timeline | None = None,
    limit_name: str = VRAM_LIMIT,
    read: Callable[[Checkpoint, torch.dtype], ImageVAE] = ImageVAE.read,
) -> "LowVRAMVAE":
    """A VAE's file as its family's `read` reads it, which raises WrongModel for any but the family's.

    `device` None: ComfyUI's own choice. `limit_name`: of the input that sets `limit_bytes`."""
    # outside the node's inference mode, as the weights are
    image_vae = read(checkpoint, dtype)
    with torch.inference_mode(False):
        return LowVRAMVAE(image_vae, limit_bytes=limit_bytes, device=device, timeline=timeline, limit_name=limit_name)


class LowVRAMVAE(comfy.sd.VAE):
    """ComfyUI's VAE with our engine inside.

    Guarantees beyond the native VAE: tiles never change the image; a batch of images is a batch, not a video;
    weights and activations on the device stay within `limit_bytes` (None: what is free when the work starts).
    """

    def __init__(
        self,
        image_vae: ImageVAE,
        *,
        limit_bytes: int | None = None,
        device: torch.device | None = None,
        timeline: Timeline | None = None,
        limit_name: str = VRAM_LIMIT,
    ) -> None:
        # the native __init__ detects and builds a network from a state dict; ours is built already
        self.first_stage_model = image_vae
        self.limit_bytes, self.limit_name = limit_bytes, limit_name
        self.timeline = timeline or Timeline(executing_prompt_id)
        self.device = device or comfy.model_management.vae_device()
        self.output_device = comfy.model_management.intermediate_device()
        self.vae_dtype = image_vae.dtype
        self.working_dtypes = [image_vae.dtype]
        self.patcher = comfy.model_patcher.ModelPatcher(
            image_vae, load_device=self.device, offload_device=comfy.model_management.vae_offload_device()
        )
        self.size = comfy.model_management.module_size(image_vae)
        self.downscale_ratio = self.upscale_ratio = image_vae.scale
        self.downscale_index_formula = self.upscale_index_formula = None
        self.latent_channels = image_vae.latent_channels
        self.latent_dim = 3 if image_vae.has_frames else 2
        self.output_channels = image_vae.image_channels
        self.pad_channel_value = 1.0
        self.extra_1d_channel = None
        self.crop_input = True
        self.not_video = True
        self.disable_offload = True
        self.handles_tiling = False
        self.format_encoded = None

    def decode(self, samples_in: torch.Tensor, vae_options: dict[str, Any] | None = None) -> torch.Tensor:
        """(B, 16, 1, h, w) -> (B, H, W, 3); Layered's VAE, (B, 16, F, h, w) -> (B * F, H, W, 4)."""
        return self.decode_tiled(samples_in)

    @errors_sent()
    @in_words("the VAE ran")
    def decode_tiled(
        self,
        samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        """As `decode`. Tile sizes are in latents; the overlap is what exactness needs, whatever is asked for."""
        vae = self.first_stage_model
        check_latent("The latent", samples)
        size = (samples.shape[-2] * vae.scale, samples.shape[-1] * vae.scale)
        images = samples.shape[0] * (samples.shape[2] if samples.ndim == 5 else 1)
        nbytes = images * size[0] * size[1] * vae.pixel_bytes
        check_room(nbytes, f"Decoding {images} images of {size[1]}x{size[0]} px", _FEWER)
        tile_px = _tile(tile_x, tile_y) * vae.scale
        decoded = self._run().decode(samples, tile_px=tile_px, out_device=self.output_device)
        return decoded.to(comfy.model_management.intermediate_dtype())

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, 16, 1, H/8, W/8)."""
        return self.encode_tiled(pixel_samples)

    @errors_sent()
    @in_words("the VAE ran")
    def encode_tiled(
        self,
        pixel_samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        """As `encode`. Tile sizes are in pixels; borders beyond multiples of 8 pixels are cropped. Alpha is dropped;
        by Layered's VAE it is encoded, opaque where an image has none."""
        vae = self.first_stage_model
        check_image("The image", pixel_samples)
        if min(pixel_samples.shape[1:3]) < vae.scale:
            raise InvalidRequest(
                "The VAE encodes images (B, H, W, C) of at least {least_px}x{least_px} pixels; got {shape}.",
                code="vae.image_too_small",
                least_px=vae.scale,
                shape=tuple(pixel_samples.shape),
            )
        pixels = self.vae_encode_crop_pixels(pixel_samples)
        encoded = self._run().encode(pixels, tile_px=_tile(tile_x, tile_y), out_device=self.output_device)
        return encoded.to(comfy.model_management.intermediate_dtype())

    def memory_used_decode(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Live bytes of decoding latents (..., h, w) whole, one image at a time."""
        scale = self.first_stage_model.scale
        return self.first_stage_model.plan_decode(shape[-2] * scale, shape[-1] * scale).peak_bytes

    def memory_used_encode(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Live bytes of encoding pixels (..., H, W) whole, one image at a time."""
        scale = self.first_stage_model.scale
        return self.first_stage_model.plan_encode(shape[-2] // scale * scale, shape[-1] // scale * scale).peak_bytes

    def get_sd(self) -> NoReturn:
        raise Unsupported(
            "VAESave does not work with this VAE: in memory it is folded to one frame.\n\nWhat to do: copy the file "
            "that it was loaded from.",
            code="vae.saved",
        )

    def _run(self) -> VaeRun:
        """One call's work, within ComfyUI's memory; it brings the weights through ComfyUI, which keeps them there."""

        def bring(room: int) -> None:
            comfy.model_management.load_models_gpu([self.patcher], memory_required=room, force_full_load=True)

        return VaeRun(
            self.first_stage_model,
            Hardware.detect(self.device),
            bring,
            timeline=self.timeline,
            surroundings=InComfyUI(self.patcher),
            limit=loader_limit(self.limit_bytes, self.limit_name),
        )


def _tile(width: int | None, height: int | None) -> int:
    """The longer side; 0 where none is asked for."""
    for side in (width, height):
        if side is not None:
            check_number("The tile size", side, least=0)
    return int(max(width or 0, height or 0))
