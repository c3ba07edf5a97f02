"""Train the VAE: flat shapes into latents with the real model's statistics, robust to a sampler's small errors."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from qwenimage_lowvram.engine.models.qwen_image_vae.latent_statistics import LATENTS_MEAN, LATENTS_STD

from .data import Scene, draw_scene, paint
from .models import build_vae, use_single_frame
from .run import TimedRun

BATCH, CROP_PX = 8, 64
CROPPED_PART = 0.8  # of the time: crops train four times as many edges a second, whole images what attention sees
LATENT_NOISE = 0.2  # largest noise on normalised latents that the decoder learns to ignore
POSTERIOR_STD = 0.1  # of normalised latents, what encode(...).sample() adds


def train_vae(path: Path, *, seconds: float, seed: int, device: torch.device) -> AutoencoderKLQwenImage:
    """Return the trained VAE, in float32 with the 2D view on."""
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    use_single_frame(vae, enabled=True)
    mean, std = _statistics(device)
    run = TimedRun(vae, path, seconds=seconds, lr=3e-3, decay=0.998, weight_decay=0.0, warmup_steps=100)
    rng = random.Random(f"vae {seed} {run.step}")
    for _ in run.steps():
        cropped = run.used_seconds < CROPPED_PART * seconds
        images = draw_batch(rng, BATCH if cropped else BATCH // 2, crop_px=CROP_PX if cropped else None).to(device)
        moments = vae.quant_conv(vae.encoder(images))
        raw, log_variance = moments.chunk(2, dim=1)
        latents = (raw - mean) / std
        error = vae.decoder(vae.post_quant_conv(_disturb(latents) * std + mean)) - images
        l1, mse = error.abs().mean(), error.square().mean()
        spread = latents.mean((0, 2, 3, 4)).square().mean() + (latents.std((0, 2, 3, 4)) - 1).square().mean()
        outliers = (latents.abs() - 2.5).relu().square().mean()
        posterior = (log_variance - 2 * (POSTERIOR_STD * std).log()).square().mean()
        run.update(
            l1 + 4 * mse + 0.05 * spread + 0.2 * outliers + 0.001 * posterior,
            l1=l1, mse=mse, spread=spread, outliers=outliers,
        )  # fmt: skip
    run.use_average()
    return vae.requires_grad_(False)


def sharpen_decoder(
    vae: AutoencoderKLQwenImage, path: Path, *, seconds: float, seed: int, device: torch.device
) -> None:
    """Train the decoder on, in place, while the encoder stays: the latents that the transformer learns are the same."""
    torch.manual_seed(seed)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    mean, std = _statistics(device)
    run = TimedRun(vae, path, seconds=seconds, lr=2e-3, decay=0.998, weight_decay=0.0, warmup_steps=100)
    rng = random.Random(f"decoder {seed} {run.step}")
    for _ in run.steps():
        cropped = run.used_seconds < CROPPED_PART * seconds
        images = draw_batch(rng, BATCH if cropped else BATCH // 2, crop_px=CROP_PX if cropped else None).to(device)
        with torch.no_grad():
            latents = (vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)[0] - mean) / std
        error = vae.decoder(vae.post_quant_conv(_disturb(latents) * std + mean)) - images
        l1, mse = error.abs().mean(), error.square().mean()
        run.update(l1 + 4 * mse, l1=l1, mse=mse)
    run.use_average()
    vae.requires_grad_(False)


def _statistics(device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (LATENTS_MEAN, LATENTS_STD))


def _disturb(latents: torch.Tensor) -> torch.Tensor:
    amount = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, 1, device=latents.device)
    return latents + amount * torch.randn_like(latents)


def draw_batch(rng: random.Random, count: int, *, crop_px: int | None) -> torch.Tensor:
    """Return (count, 3, 1, side, side) in -1..1, of training scenes; crops lie about a shape."""
    images = []
    for _ in range(count):
        scene = draw_scene(rng, held_out=False)
        image = paint(scene, rng)
        images.append(_crop(image, scene, rng, crop_px) if crop_px else image)
    return to_tensor(np.stack(images))


def _crop(image: np.ndarray, scene: Scene, rng: random.Random, crop_px: int) -> np.ndarray:
    differs = np.argwhere((image != image[0, 0]).any(-1))
    y, x = rng.choice(differs) - [rng.randrange(crop_px), rng.randrange(crop_px)]
    top, left = (int(np.clip(v, 0, image.shape[0] - crop_px)) for v in (y, x))
    return image[top : top + crop_px, left : left + crop_px]


def to_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, images: torch.Tensor) -> torch.Tensor:
    """Return normalised latents packed 2x2 as the transformer takes them, (B, tokens, 64)."""
    mean, std = _statistics(images.device)
    latents = (vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)[0] - mean) / std
    b, c, _, h, w = latents.shape
    latents = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return latents.reshape(b, h * w // 4, c * 4)
