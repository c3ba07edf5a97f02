"""Latents to images and back, in one call each: makes room, brings the VAE, works in tiles, and measures."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..compute.finite import is_finite
from ..compute.interruption import interruptible
from ..errors import InvalidRequest
from ..hardware import Hardware
from ..models.qwen_image_vae.image_vae import ImageVAE
from ..out_of_memory import in_words
from ..planning.request import TOKEN_PX
from ..planning.stages import Stage, decode_stage
from ..planning.tiles import TilePlan
from ..streaming import Pace, StreamOrder
from .limit import Limit
from .phases import Phase, PhaseProgress
from .surroundings import Surroundings
from .timeline import Timeline


class VaeRun:
    """What one call of the VAE needs.

    Guarantees: weights and activations on the device stay within the limit, as planned before they are brought there;
    tiles never change the image; what is not finite is an error, never an image.
    """

    def __init__(
        self,
        vae: ImageVAE,
        hardware: Hardware,
        bring: Callable[[int], None],
        *,
        timeline: Timeline,
        surroundings: Surroundings,
        limit: Limit,
    ) -> None:
        """`bring` moves the weights to the hardware's device, where there is to be so much room beside them. They leave
        as whoever owns them says."""
        self._vae, self._device, self._bring = vae, hardware.device, bring
        self._order, self._pace = StreamOrder(hardware), Pace()
        self._timeline, self._surroundings, self._limit = timeline, surroundings, limit
        self._weights_bytes = vae.footprint.weights_bytes

    @in_words("the VAE ran")
    def decode(self, latents: Tensor, *, tile_px: int = 0, out_device: torch.device) -> Tensor:
        """(B, 16, h, w) or (B, 16, F, h, w) -> (B, H, W, C) in fp32, with alpha (B * F, H, W, 4): as
        `ImageVAE.decode`. Raises DoesNotFit before anything is brought to the device, and InvalidRequest."""
        vae = self._vae
        size = (latents.shape[-2] * vae.scale, latents.shape[-1] * vae.scale)
        with (
            self._ready(Phase.DECODING, vae.plan_decode, size, tile_px) as (progress, options),
            # the weights lie on the device by now, whatever else does
            self._timeline.stage(Stage.DECODE, self._device, own_bytes=self._weights_bytes) as running,
        ):

            def on_plan(tiles: TilePlan) -> None:
                count = latents.shape[0] * (latents.shape[2] if latents.ndim == 5 else 1)
                progress(0, count * len(tiles))
                ram_bytes = count * tiles.width * tiles.height * vae.pixel_bytes
                host = self._device.type == "cpu"
                running.planned(decode_stage(tiles, weights_bytes=self._weights_bytes, ram_bytes=ram_bytes, host=host))

            images = vae.decode(latents, on_plan=on_plan, out_device=out_device, **options)
            self._order.finish_compute()  # what the stage took is what the device took
        return _finite(images)

    @in_words("the VAE ran")
    def encode(self, images: Tensor, *, tile_px: int = 0, out_device: torch.device) -> Tensor:
        """(B, H, W, C), H and W multiples of 8 -> (B, 16, 1, H/8, W/8) in fp32. Errors as `decode`."""
        vae = self._vae
        with self._ready(Phase.ENCODING_IMAGE, vae.plan_encode, images.shape[1:3], tile_px) as (_, options):
            latents = vae.encode(images, out_device=out_device, **options)
        return _finite(latents)

    def require_decodes(self, height: int, width: int) -> None:
        """Raise DoesNotFit where the limit has no room for decoding images of that many px. Moves nothing."""
        self._planned(self._vae.plan_decode, (height, width), 0)

    def _planned(self, plan: Callable[..., TilePlan], size: Sequence[int], tile_px: int) -> TilePlan:
        """Within the limit alone, whatever is free."""
        limit = self._limit
        with limit.naming(self._device, limit.nbytes or 0):
            return plan(*size, None if limit.nbytes is None else limit.nbytes - self._weights_bytes, tile_px)

    @contextmanager
    def _ready(
        self, phase: Phase, plan: Callable[..., TilePlan], size: Sequence[int], tile_px: int
    ) -> Iterator[tuple[PhaseProgress, dict[str, Any]]]:
        """Make room for the plan and bring the VAE; gives what it works with, progress and interruption after each tile
        included. size: height and width in px."""
        limit, weights, around = self._limit, self._weights_bytes, self._surroundings
        progress = PhaseProgress(around, phase)
        # of an image larger than any card, ask for half the card: tiles need no more
        room = min(self._planned(plan, size, tile_px).peak_bytes, around.total_bytes(self._device) // 2)
        # before the weights are brought: what has to leave for the tiles must not be this VAE
        budget = around.device_bytes(self._device, limit.nbytes, weights + room) - weights
        self._bring(room)

        def on_tile(done: int, total: int) -> None:
            self._pace.keep(self._order)
            around.check()
            progress(done, total)
            self._timeline.sample()

        long = interruptible(size[0] * size[1] // TOKEN_PX**2, around.check)
        with limit.naming(self._device, budget + weights), long, _current(self._device):
            yield progress, {"limit_bytes": budget, "tile_px": tile_px, "on_tile": on_tile}


def _current(device: torch.device) -> Any:
    """Libraries' own kernels take the current card for theirs."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _finite(result: Tensor) -> Tensor:
    if not is_finite(result):
        raise InvalidRequest(
            "The VAE's output holds numbers that are not finite (NaN or infinity): it was given huge numbers.\n\nWhat "
            "to do: check the nodes that made them; a model that overflows in fp16 does this.",
            code="vae.made_not_finite",
        )
    return result
