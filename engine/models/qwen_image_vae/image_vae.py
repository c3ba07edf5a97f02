"""Latents to images and back, within a memory limit; owns the loop over tiles and the retries."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import nn

from ...errors import DoesNotFit, InvalidRequest
from ...files.checkpoint import Checkpoint, TensorEntry
from ...log import logger
from ...out_of_memory import Short, ran_out, reason, shortage
from ...planning.footprint import VAEFootprint
from ...planning.tiles import Span, TilePlan, plan_tiles
from ...streaming import read_params
from .network import Half, build_decoder, build_encoder
from .tensor_names import RGBA, check_is_image_vae, needed_tensors, to_diffusers_names

OnTile = Callable[[int, int], None]
OnPlan = Callable[[TilePlan], None]


class ImageVAE(nn.Module):
    """Qwen-Image's VAE for still images: what diffusers computes, without its video cache. Layered's has alpha.

    * Tiles change memory, never pixels: the tiled result equals the untiled one up to the rounding of convolutions.
    * Live bytes beside the weights stay within `limit_bytes`, as the plan says beforehand.
    * Not one activation is copied to a wider dtype as a whole; attention scores never exist as a whole.
    """

    has_frames: ClassVar[bool] = True  # latents are (B, C, F, h, w)

    def __init__(self, encoder: Half, decoder: Half, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.dtype = dtype

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, torch.Tensor], *, dtype: torch.dtype) -> "ImageVAE":
        """Build from diffusers' or ComfyUI's tensors, which are copied; raises WrongModel for any other VAE."""
        tensors = to_diffusers_names(state_dict)
        check_is_image_vae({name: tensor.shape for name, tensor in tensors.items()}, "The VAE")
        return cls(build_encoder(tensors, dtype), build_decoder(tensors, dtype), dtype).eval()

    @staticmethod
    def needed(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
        """Tensors of a file, under diffusers' names. Raises as `from_state_dict` does."""
        return needed_tensors(checkpoint)

    @classmethod
    def read(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> "ImageVAE":
        """From a file in diffusers' or ComfyUI's names, on the host. Raises as `from_state_dict` does."""
        needed = cls.needed(checkpoint)
        shapes = {name: entry.shape for name, entry in needed.items()}
        # outside of any inference mode, so that the weights may be used in every thread
        with torch.inference_mode(False):
            tensors = read_params(needed, shapes, dtype, str(checkpoint.path))
            checkpoint.require_unchanged()
            return cls.from_state_dict(tensors, dtype=dtype)

    @classmethod
    def without_weights(cls, checkpoint: Checkpoint, *, dtype: torch.dtype) -> "ImageVAE":
        """On the meta device, from a file's header alone: it plans, and computes nothing. Raises as
        `from_state_dict` does."""
        tensors = {name: torch.empty(e.shape, device="meta") for name, e in cls.needed(checkpoint).items()}
        return cls.from_state_dict(tensors, dtype=dtype)

    @property
    def footprint(self) -> VAEFootprint:
        weights = sum(p.nbytes for p in self.parameters())
        return VAEFootprint(weights, self.plan_decode, self.decode_flops, self.pixel_bytes)

    @property
    def scale(self) -> int:
        """Pixels per latent along one axis: 8."""
        return self.decoder.network.scale

    @property
    def latent_channels(self) -> int:
        return self.decoder.whole[0].weight.shape[1]

    @property
    def image_channels(self) -> int:
        """Of the images: RGB or RGBA."""
        return self.decoder.network.local[-1].outputs

    @property
    def pixel_bytes(self) -> int:
        """Of a decoded image: its channels in fp32."""
        return 4 * self.image_channels

    @property
    def weights_device(self) -> torch.device:
        return next(self.parameters()).device

    def plan_decode(
        self, height: int, width: int, limit_bytes: int | None = None, tile_px: int = 0, *, result_bytes: int = 0
    ) -> TilePlan:
        """The tiles and the live bytes of decoding one image of height x width pixels; moves nothing."""
        return self._plan(self.decoder, "decode", (height, width), limit_bytes, tile_px, self.dtype, result_bytes)

    def decode_flops(self, height: int, width: int, work: float = 1.0) -> float:
        """Floating-point operations of decoding one image of height x width pixels, in tiles that compute `work` pixels
        for each of the image."""
        return self.decoder.flops(height // self.scale * (width // self.scale), work)

    def plan_encode(
        self, height: int, width: int, limit_bytes: int | None = None, tile_px: int = 0, *, result_bytes: int = 0
    ) -> TilePlan:
        """The tiles and the live bytes of encoding one image of height x width pixels; moves nothing."""
        return self._plan(self.encoder, "encode", (height, width), limit_bytes, tile_px, self.dtype, result_bytes)

    @torch.no_grad()
    def decode(
        self,
        latents: torch.Tensor,
        *,
        limit_bytes: int | None = None,
        tile_px: int = 0,
        on_tile: OnTile | None = None,
        on_plan: OnPlan | None = None,
        out_device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Raw latents (B, 16, 1, h, w) or (B, 16, h, w) -> images (B, H, W, C), fp32 in 0..1, one after another.

        C is `image_channels`. With alpha, frames are layers: (B, 16, F, h, w) -> (B * F, H, W, 4).
        `tile_px` is the most that an inner tile writes along an axis (0: as large as fits the limit).
        `on_tile(done, total)` is called after each tile; what it raises ends the decode. `on_plan` is called before
        each attempt: again in fp32 if fp16 overflowed, again in smaller tiles if memory ran out.
        Raises InvalidRequest for other shapes, DoesNotFit before anything is computed.
        """
        if latents.ndim == 5 and (latents.shape[2] == 1 or (self.has_frames and self.image_channels == RGBA)):
            latents = latents.movedim(2, 1).flatten(0, 1)
        if latents.ndim in (4, 5) and latents.shape[1] != self.latent_channels:
            raise InvalidRequest(
                "These latents have {found} channels, but this VAE decodes {channels}: they belong to another model. "
                "Use the VAE of the model that made them (16 channels: qwen_image_vae.safetensors, 64: "
                "qwen_image_2.1_vae_bf16.safetensors).",
                code="vae.other_models_latents",
                found=latents.shape[1],
                channels=self.latent_channels,
            )
        if latents.ndim != 4 or 0 in latents.shape:
            raise InvalidRequest(
                "The VAE decodes latents (B, {channels}, 1, h, w) of still images; got {shape}.",
                code="vae.wrong_latents",
                channels=self.latent_channels,
                shape=tuple(latents.shape),
            )
        b, _, h, w = latents.shape
        size = (h * self.scale, w * self.scale)
        images = torch.empty(b, *size, self.image_channels, device=out_device)

        def run(plan: TilePlan, dtype: torch.dtype) -> bool:
            for index in range(b):
                tick = _ticker(on_tile, index * len(plan), b * len(plan))
                latent = latents[index : index + 1].to(self.weights_device)
                if not self._decode_one(latent.to(dtype), images[index], plan, tick):
                    return False
            return True

        self._run(run, self.decoder, "decode", size, limit_bytes, tile_px, self._result_bytes(images), on_plan)
        return images

    @torch.no_grad()
    def encode(
        self,
        images: torch.Tensor,
        *,
        limit_bytes: int | None = None,
        tile_px: int = 0,
        on_tile: OnTile | None = None,
        on_plan: OnPlan | None = None,
        out_device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Images (B, H, W, C) in 0..1 -> raw latents (B, 16, 1, H/8, W/8), fp32: the posterior's mean.

        Options and errors as in `decode`; H and W must be multiples of 8.
        """
        if images.ndim != 4 or images.shape[-1] != self.image_channels or 0 in images.shape:
            raise InvalidRequest(
                "The VAE encodes images (B, H, W, {channels}); got {shape}.",
                code="vae.wrong_images",
                channels=self.image_channels,
                shape=tuple(images.shape),
            )
        b, height, width, _ = images.shape
        self._check_size(height, width)
        shape = (b, self.latent_channels, 1, height // self.scale, width // self.scale)
        latents = torch.empty(shape, device=out_device)

        def run(plan: TilePlan, dtype: torch.dtype) -> bool:
            for index in range(b):
                tick = _ticker(on_tile, index * len(plan), b * len(plan))
                latent = self._encode_one(images[index : index + 1], plan, dtype, tick)
                if not _is_finite(latent):
                    return False
                latents[index, :, 0] = latent[0]
            return True

        size = (height, width)
        self._run(run, self.encoder, "encode", size, limit_bytes, tile_px, self._result_bytes(latents), on_plan)
        return latents if self.has_frames else latents[:, :, 0]

    def _decode_one(self, latent: torch.Tensor, image: torch.Tensor, plan: TilePlan, tick: OnTile) -> bool:
        """Fill image (H, W, C) from latent (1, 16, h, w); False as soon as a tile is not finite."""
        features = [_apply(self.decoder.whole, [latent.contiguous(memory_format=torch.channels_last)])]
        for done, (row, column) in enumerate(plan, start=1):
            tile = _apply(self.decoder.local, features if plan.is_whole else [_cut(features[0], row, column, 1)])
            if not _is_finite(tile):
                return False
            pixels = _core(tile, row, column, self.scale)[0].permute(1, 2, 0).float()  # (h, w, C)
            pixels = pixels.mul_(0.5).add_(0.5).clamp_(0, 1)
            image[_pixels(row, self.scale), _pixels(column, self.scale)] = pixels
            del tile, pixels  # or they would live beside the next tile
            tick(done, len(plan))
        return True

    def _encode_one(self, image: torch.Tensor, plan: TilePlan, dtype: torch.dtype, tick: OnTile) -> torch.Tensor:
        """(1, H, W, C) -> (1, 16, h, w)."""
        device = self.weights_device
        features: list[torch.Tensor] = []
        for done, (row, column) in enumerate(plan, start=1):
            pixels = [_cut(image.permute(0, 3, 1, 2), row, column, self.scale).to(device)]
            pixels.append(pixels.pop().mul(2).sub_(1).to(dtype))
            tile = _apply(self.encoder.local, pixels)
            if plan.is_whole:
                features = [tile]
            else:
                if not features:
                    shape = (1, tile.shape[1], plan.rows[-1].stop, plan.columns[-1].stop)
                    features = [torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)]
                features[0][:, :, _pixels(row, 1), _pixels(column, 1)] = _core(tile, row, column, 1)
            del tile
            tick(done, len(plan))
        return _apply(self.encoder.whole, features)

    def _run(
        self,
        run: Callable[[TilePlan, torch.dtype], bool],
        half: Half,
        task: str,
        size: tuple[int, int],
        limit_bytes: int | None,
        tile_px: int,
        result_bytes: int,
        on_plan: OnPlan | None,
    ) -> None:
        """Plan and run, again in fp32 if fp16 overflowed, again in smaller tiles if memory ran out all the same."""
        dtype, why = self.dtype, ""
        short: Short | None = None
        while True:
            try:
                plan = self._plan(half, task, size, limit_bytes, tile_px, dtype, result_bytes)
            except DoesNotFit as error:
                if short is None:
                    raise
                raise ran_out(f"in the smallest tiles of the VAE ({task})", short, why) from error
            logger.info("%r", plan)
            if on_plan is not None:
                on_plan(plan)
            try:
                if run(plan, dtype):
                    return
                out_of_memory = False
            except Exception as error:
                short, why = shortage(error), reason(error)
                if short is None:
                    raise
                out_of_memory = True
            # retry after the except block: the traceback keeps the failed attempt's tensors alive
            if out_of_memory:
                limit_bytes = plan.peak_bytes // 2
                logger.warning("Memory ran out (%s) in %r: again with %d MiB.", why, plan, limit_bytes // 2**20)
            elif dtype == torch.float32:
                raise InvalidRequest(
                    "VAE {task} overflows in float32: the input holds NaN, infinity or huge numbers.\n\nWhat to "
                    "do: check the nodes that made it; a model that overflows in fp16 does this.",
                    code="vae.overflow",
                    task=task,
                )
            else:
                logger.warning("The VAE overflowed in %s: the whole %s runs again in float32.", dtype, task)
                dtype = torch.float32

    def _plan(
        self,
        half: Half,
        task: str,
        size: tuple[int, int],
        limit_bytes: int | None,
        tile_px: int,
        dtype: torch.dtype,
        result_bytes: int,
    ) -> TilePlan:
        self._check_size(*size)
        return plan_tiles(
            half.network,
            task=task,
            size=(size[0] // self.scale, size[1] // self.scale),
            itemsize=dtype.itemsize,
            result_bytes=result_bytes,
            limit_bytes=limit_bytes,
            tile_latents=max(1, tile_px // self.scale) if tile_px else 0,
        )

    def _check_size(self, height: int, width: int) -> None:
        if height < self.scale or width < self.scale or height % self.scale or width % self.scale:
            raise InvalidRequest(
                "The VAE works on multiples of {multiple} pixels; got {width}x{height}. Crop or resize the image.",
                code="vae.wrong_size",
                multiple=self.scale,
                width=width,
                height=height,
            )

    def _result_bytes(self, result: torch.Tensor) -> int:
        shares_device = result.device.type == self.weights_device.type
        return result.numel() * result.element_size() if shares_device else 0


def _apply(layers: nn.ModuleList, source: list[torch.Tensor]) -> torch.Tensor:
    """Run the layers on the one tensor in `source`, which is taken out, so that it is freed after its last use."""
    x = source.pop()
    for layer in layers:
        x = layer(x)
    return x


def _cut(x: torch.Tensor, row: Span, column: Span, unit: int) -> torch.Tensor:
    """What a tile reads of (1, C, h, w), in memory of its own."""
    rows = slice(row.read_start * unit, row.read_stop * unit)
    columns = slice(column.read_start * unit, column.read_stop * unit)
    return x[:, :, rows, columns].contiguous(memory_format=torch.channels_last)


def _core(x: torch.Tensor, row: Span, column: Span, unit: int) -> torch.Tensor:
    """What a tile writes, without its halo."""
    rows = slice((row.start - row.read_start) * unit, (row.stop - row.read_start) * unit)
    columns = slice((column.start - column.read_start) * unit, (column.stop - column.read_start) * unit)
    return x[:, :, rows, columns]


def _pixels(span: Span, unit: int) -> slice:
    return slice(span.start * unit, span.stop * unit)


def _is_finite(x: torch.Tensor) -> bool:
    # bf16 and fp32 have the range; asking them would only make the device wait
    return x.dtype != torch.float16 or bool(torch.isfinite(x).all())


def _ticker(on_tile: OnTile | None, before: int, total: int) -> OnTile:
    def tick(done: int, _: int) -> None:
        if on_tile is not None:
            on_tile(before + done, total)

    return tick
