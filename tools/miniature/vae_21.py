"""Build and train 2.1's VAE in small: RGBA at 1/16 into 64 channels with the real model's statistics."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage21
from qwenimage_lowvram.engine.models.qwen_image_21_vae.latent_statistics import LATENTS_MEAN, LATENTS_STD
from torch import Tensor, nn

from .rgba import SIDE_PX, draw, paint
from .run import TimedRun, lower_precision
from .vae import LATENT_NOISE

BATCH = 8
CHANNELS = 64
WHITENED = 128  # images, before the first step
LEAST_STRENGTH = 1e-4  # of a direction in the features, as part of the strongest: what is weaker is not blown up
WIDTH, DECODER_WIDTH = 8, 8
# residual blocks of each level that are trained; the others hand on what they are given, which spares half of the work
ENCODER_BLOCKS, DECODER_BLOCKS = (0, 1, 1, 2, 2), (3, 3, 2, 1, 1)


def build_vae() -> AutoencoderKLQwenImage21:
    """Return an untrained VAE; the second layers of residual blocks, added to what is there, begin at 0."""
    vae = AutoencoderKLQwenImage21(
        base_dim=WIDTH,
        decoder_base_dim=DECODER_WIDTH,
        latents_mean=list(LATENTS_MEAN),
        latents_std=list(LATENTS_STD),
    )
    for name, parameter in vae.named_parameters():
        if ".conv2." in name:
            nn.init.zeros_(parameter)
    return vae


class _Trained:
    """While it lasts, the VAE has the blocks that are trained alone."""

    def __init__(self, vae: AutoencoderKLQwenImage21) -> None:
        self._levels = [*vae.encoder.down_blocks, *vae.decoder.up_blocks]
        self._all = [level.resnets for level in self._levels]

    def __enter__(self) -> None:
        for level, count in zip(self._levels, (*ENCODER_BLOCKS, *DECODER_BLOCKS), strict=True):
            level.resnets = level.resnets[:count]

    def __exit__(self, *_: object) -> None:
        for level, blocks in zip(self._levels, self._all, strict=True):
            level.resnets = blocks


def train_vae(path: Path, *, seconds: float, seed: int) -> AutoencoderKLQwenImage21:
    """Return the trained VAE, in float32, frozen."""
    torch.manual_seed(seed)
    vae = build_vae()
    with _Trained(vae):
        if not path.exists():
            rng = random.Random(f"vae 2.1 {seed}")
            whiten(vae, to_tensor(np.stack([paint(draw(rng), rng) for _ in range(WHITENED)])))
        run = TimedRun(vae, path, seconds=seconds, lr=3e-3, decay=0.995, weight_decay=0.0, warmup_steps=100)
        rng = random.Random(f"vae 2.1 {seed} {run.step}")
        for _ in run.steps():
            images = to_tensor(np.stack([paint(draw(rng), rng, side_px=SIDE_PX) for _ in range(BATCH)]))
            with lower_precision():
                moments = vae.quant_conv(vae.encoder(images)).float()
            latents, log_variance = _normalise(moments[:, :CHANNELS]), moments[:, CHANNELS:]
            noisy = latents + LATENT_NOISE * torch.rand(BATCH, 1, 1, 1, 1) * torch.randn_like(latents)
            with lower_precision():
                made = _decoder(vae, noisy).float()
            error = made - images
            l1, mse = error.abs().mean(), error.square().mean()
            spread = latents.mean((0, 2, 3, 4)).square().mean() + (latents.std((0, 2, 3, 4)) - 1).square().mean()
            outliers = (latents.abs() - 2.5).relu().square().mean()
            posterior = (log_variance + 4).square().mean()
            loss = l1 + 4 * mse + 0.05 * spread + 0.2 * outliers + 0.001 * posterior
            run.update(loss, l1=l1, mse=mse, spread=spread)
        run.use_average()
    return vae.requires_grad_(False)


@torch.no_grad()
def whiten(vae: AutoencoderKLQwenImage21, images: Tensor) -> None:
    """Set the layers next to the latents so that an untrained encoder's have the statistics that they are to have, and
    its decoder is given them with mean 0 and deviation 1: else the first thousand steps learn no more than that."""
    features = vae.encoder(images).transpose(0, 1).flatten(1).T.double()
    centred = features - features.mean(0)
    strengths, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    strengths, directions = strengths[-CHANNELS:], directions[:, -CHANNELS:]
    scale = (strengths + LEAST_STRENGTH * strengths.max()).rsqrt()
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (LATENTS_MEAN, LATENTS_STD))
    weight = (directions * scale).T * std[:, None]
    vae.quant_conv.weight[:CHANNELS, :, 0, 0] = weight
    vae.quant_conv.bias[:CHANNELS] = mean - weight @ features.mean(0)
    vae.post_quant_conv.weight[:, :, 0, 0] = torch.diag(1 / std)
    vae.post_quant_conv.bias[:] = -mean / std


def to_tensor(images: np.ndarray) -> Tensor:
    """(N, H, W, 4) uint8 to (N, 4, 1, H, W) in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1


def _statistics() -> tuple[Tensor, ...]:
    return tuple(torch.tensor(v).view(1, -1, 1, 1, 1) for v in (LATENTS_MEAN, LATENTS_STD))


def _normalise(latents: Tensor) -> Tensor:
    mean, std = _statistics()
    return (latents - mean) / std


def _decoder(vae: AutoencoderKLQwenImage21, latents: Tensor) -> Tensor:
    mean, std = _statistics()
    return vae.decoder(vae.post_quant_conv(latents * std + mean), first_chunk=True)


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage21, images: np.ndarray) -> Tensor:
    """(N, H, W, 4) uint8 to normalised latents as tokens, (N, H * W / 256, 64)."""
    with lower_precision():
        latents = vae.quant_conv(vae.encoder(to_tensor(images)))[:, :CHANNELS].float()
    return _normalise(latents).flatten(2).transpose(1, 2)


@torch.no_grad()
def decode(vae: AutoencoderKLQwenImage21, tokens: Tensor) -> np.ndarray:
    """Normalised latents of square images, (N, tokens, 64), to (N, H, W, 4) uint8."""
    side = round(tokens.shape[1] ** 0.5)
    images = _decoder(vae, tokens.transpose(1, 2).unflatten(2, (1, side, side)))[:, :, 0].clamp(-1, 1)
    return np.asarray(((images + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8))
