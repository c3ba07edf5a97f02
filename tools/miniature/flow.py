"""Train the transformer: flow matching on packed latents under captions, as the pipeline will sample it."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers.models.transformers import transformer_qwenimage
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from .data import DIAMETERS, LANGUAGES, Scene, caption, draw_scene, forget_some_facts, locate, paint
from .models import SCHEDULER, build_transformer
from .run import TimedRun, log
from .text import embed, tokenize
from .vae import encode, to_tensor

BATCH, EARLY_BATCH, EARLY_PART = 64, 32, 0.8  # of the time: first more steps, then less noise
POOL = 20_000  # images, encoded once; their captions are worded anew each time
SHAPE_WEIGHT = 4  # of the loss where the caption puts a shape; the rest is background, which is soon learnt
DROPPED_TO_SPACE, DROPPED_TO_NOTHING = 0.08, 0.02
GRID = 8  # tokens along a side: 128 px / 8 of the VAE / 2 of the packing


@dataclass(frozen=True)
class Pool:
    """Scenes, their latents, (N, 64, 64) float16, and the weight of each token in the loss, (N, 64)."""

    scenes: list[Scene]
    latents: torch.Tensor
    weights: torch.Tensor


def build_pool(path: Path, vae: AutoencoderKLQwenImage, *, seed: int, device: torch.device, size: int = POOL) -> Pool:
    """Draw and encode the training images; the latents are kept at `path` for a resumed run."""
    rng = random.Random(f"pool {seed}")
    scenes = [draw_scene(rng, held_out=False) for _ in range(size)]
    weights = torch.from_numpy(np.stack([weigh(scene) for scene in scenes]))
    if path.exists():
        return Pool(scenes, torch.load(path, weights_only=True), weights)
    log.info("encoding %d images", size)
    latents = []
    for start in range(0, size, BATCH):
        images = np.stack([paint(scene, rng) for scene in scenes[start : start + BATCH]])
        latents.append(encode(vae, to_tensor(images).to(device)).half().cpu())
    pool = Pool(scenes, torch.cat(latents), weights)
    torch.save(pool.latents, path)
    return pool


def weigh(scene: Scene) -> np.ndarray:
    """Return the weights of a scene's tokens: SHAPE_WEIGHT where a shape may lie, 1 elsewhere, scaled to mean 1.

    They follow from what the caption says, not from the single image, so that the best prediction stays the same.
    """
    weights = np.ones((GRID, GRID), np.float32)
    centres, jitter = locate(scene)
    for item, (x, y) in zip(scene.items, centres, strict=True):
        assert item.size is not None  # scenes of the pool state every fact
        reach = jitter + DIAMETERS[item.size][1] / 2
        (top, bottom), (left, right) = ((int((v - reach) * GRID), math.ceil((v + reach) * GRID)) for v in (y, x))
        weights[max(top, 0) : bottom, max(left, 0) : right] = SHAPE_WEIGHT
    return (weights / weights.mean()).ravel()


def shift() -> float:
    """Return the factor that the scheduler's dynamic shift gives the sigmas of GRID x GRID tokens."""
    slope = (SCHEDULER["max_shift"] - SCHEDULER["base_shift"]) / (
        SCHEDULER["max_image_seq_len"] - SCHEDULER["base_image_seq_len"]
    )
    return math.exp(SCHEDULER["base_shift"] + slope * (GRID * GRID - SCHEDULER["base_image_seq_len"]))


def draw_sigmas(count: int, device: torch.device) -> torch.Tensor:
    """Return sigmas spread as the sampler's are: one from each of `count` equal parts, then shifted."""
    uniform = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    return shift() * uniform / (1 + (shift() - 1) * uniform)


def word(scene: Scene, rng: random.Random) -> str:
    chance = rng.random()
    if chance < DROPPED_TO_SPACE:
        return " "
    if chance < DROPPED_TO_SPACE + DROPPED_TO_NOTHING:
        return ""
    return caption(forget_some_facts(scene, rng), rng.choice(LANGUAGES), rng)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    **_: object,
) -> torch.Tensor:
    """Plain attention, (B, S, H, D) each: for so few tokens twice as fast to train on a CPU as the fused kernel.

    `bias`, (S), is added to the scores of each key.
    """
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


def train_transformer(
    path: Path,
    pool: Pool,
    encoder: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seconds: float,
    seed: int,
    device: torch.device,
) -> QwenImageTransformer2DModel:
    """Return the trained transformer in float32, its weights the moving average."""
    torch.manual_seed(seed)
    model = build_transformer().to(device)
    matrices = [p for name, p in model.named_parameters() if name.startswith("transformer_blocks") and p.ndim == 2]
    run = TimedRun(model, path, seconds=seconds, lr=1.5e-3, decay=0.995, matrices=matrices)
    torch.manual_seed(seed + run.step)
    rng = random.Random(f"flow {seed} {run.step}")
    fused, transformer_qwenimage.dispatch_attention_fn = transformer_qwenimage.dispatch_attention_fn, attend
    try:
        for _ in run.steps():
            count = EARLY_BATCH if run.used_seconds < EARLY_PART * seconds else BATCH
            chosen = rng.choices(range(len(pool.scenes)), k=count)
            tokens = tokenize(tokenizer, [word(pool.scenes[i], rng) for i in chosen], device)
            with torch.autocast(device.type, torch.bfloat16):
                embeds, mask = embed(encoder, tokens)
            latents, weights = (t[chosen].to(device).float() for t in (pool.latents, pool.weights))
            errors = flow_errors(model, latents, embeds, mask)
            run.update((errors * weights).mean(), plain=errors.mean(), coarse=errors[-count // 4 :].mean())
    finally:
        transformer_qwenimage.dispatch_attention_fn = fused
    run.use_average()
    return model


def flow_errors(
    model: QwenImageTransformer2DModel, latents: torch.Tensor, embeds: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return the squared error of the predicted velocity by image and token, (B, tokens); the noisiest come last."""
    noise = torch.randn_like(latents)
    sigmas = draw_sigmas(len(latents), latents.device)
    noisy = latents + sigmas[:, None, None] * (noise - latents)
    with torch.autocast(latents.device.type, torch.bfloat16):
        velocity = model(
            hidden_states=noisy,
            timestep=sigmas,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, GRID, GRID)]] * len(latents),
            return_dict=False,
        )[0]
    return (velocity.float() - (noise - latents)).square().mean(-1)
