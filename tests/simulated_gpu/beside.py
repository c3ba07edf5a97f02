"""Streaming beside the transformer's own device: a second card, the text encoder, the vision tower; and the VAE."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen25_vl.vision_patches import PatchedImage, patch_image
from qwenimage_lowvram.engine.models.qwen_image_vae.image_vae import ImageVAE
from qwenimage_lowvram.engine.streaming import bind
from torch import Tensor

from . import seams
from .rig import TIMES, Rig, finish, host
from .scenarios import Interrupted
from .tiny_models import LAYERS

PROMPTS = ([1, 2, 3, 4, 5, 6, 7], [9, 8, 7])
IMAGES = ((112, 140), (84, 168))  # height and width in pixels


def two_cards(rig: Rig, kind: str) -> list[Tensor]:
    """The last blocks are the second card's."""
    model = rig.transformer(kind)
    parts = () if rig.other is None else seams.on_second(rig.other.device, range(3, LAYERS))
    model.load((0,), (1,), parts)
    model.modulation.announce(TIMES)
    made: list[Tensor] = []
    with seams.session(model, 2, parts) as session:
        for timestep in TIMES:
            made += host(session.forward(rig.branches(timestep, residuals=True), more=timestep != TIMES[-1]))
    finish(model)
    return made


def prompts(rig: Rig, *, stop_at: int) -> list[Tensor]:
    """Encoded after an encoding that was interrupted at a layer."""
    encoder = text_encoder(rig)
    with suppress(Interrupted):
        encoder.encode(PROMPTS, on_layer=_stop(stop_at))
    return encoder.encode(PROMPTS)


def images(rig: Rig, *, stop_at: int) -> list[Tensor]:
    """Seen after a pass that was interrupted at a block."""
    tower = text_encoder(rig).vision_tower()
    shown = shown_images()
    with suppress(Interrupted):
        tower.see(shown, on_block=_stop(stop_at))
    return [seen.embeds for seen in tower.see(shown)]


def decoded(rig: Rig, *, tile_px: int) -> list[Tensor]:
    """Latents to an image and back, in tiles."""
    vae = image_vae(rig)
    latents = torch.randn(1, 16, 1, 12, 8, generator=torch.Generator().manual_seed(0))
    image = vae.decode(latents, tile_px=tile_px)
    return [image, vae.encode(image, tile_px=tile_px)]


def image_vae(rig: Rig) -> ImageVAE:
    vae = ImageVAE.from_state_dict(_vae_weights(), dtype=torch.float32)
    bind(vae, {name: weight.to(rig.hardware.device) for name, weight in vae.named_parameters()})
    return vae


def shown_images() -> list[PatchedImage]:
    generator = torch.Generator().manual_seed(0)
    return [patch_image(torch.rand(1, *size, 3, generator=generator)) for size in IMAGES]


def text_encoder(rig: Rig) -> TextEncoder:
    checkpoint = open_checkpoint(rig.models.text_encoder())
    return TextEncoder(checkpoint, dtype=torch.bfloat16, hardware=rig.hardware)


def _stop(at: int) -> Callable[[int], None]:
    def on_block(index: int) -> None:
        if index == at:
            raise Interrupted

    return on_block


@cache
def _vae_weights() -> dict[str, Tensor]:
    from small_checkpoint import make_vae

    return dict(make_vae(base_dim=8, seed=1).state_dict())
