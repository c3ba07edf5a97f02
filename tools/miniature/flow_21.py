"""Train 2.1's transformer in small, to draw and to edit: flow matching on the wanted image's latents."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Transformer2DModel
from torch import Tensor, nn

from .copies_21 import predict
from .data import LANGUAGES, Scene, caption, forget_some_facts
from .edits import Edit, order_of
from .models import SCHEDULER
from .rgba import SIDE_PX, draw, draw_rgba_edit, paint, paint_edit, word
from .run import TimedRun, has_bf16, log, lower_precision
from .text_21 import HIDDEN, Embeddings
from .vae_21 import encode

BATCH, COPIES = 16, 4  # texts, and noises of each one's image
POOL = 6000  # images and edits of each; they are worded anew each time
ENCODED_AT_ONCE = 64
DROPPED = 0.1  # of the texts are one space
GRID = SIDE_PX // 16
LAYERS, HEADS, HEAD_DIM = 4, 8, 32


@dataclass(frozen=True)
class Pool:
    """Scenes, latents (N, 1, 16, 64), and edits, latents of what is wanted and what is shown (N, 2, 16, 64)."""

    scenes: list[Scene]
    scene_latents: Tensor
    edits: list[Edit]
    edit_latents: Tensor


def build_transformer() -> QwenImage21Transformer2DModel:
    """Return an untrained transformer that predicts 0; rope axes as 16, 56 and 56 of 128."""
    model = QwenImage21Transformer2DModel(
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        context_in_dim=HIDDEN,
        axes_dims_rope=(4, 14, 14),
    )
    for layer in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
    return model


def build_pool(path: Path, vae: AutoencoderKLQwenImage21, *, seed: int, size: int = POOL) -> Pool:
    """Draw and encode what is trained on; the latents are kept at `path` for a resumed run."""
    rng = random.Random(f"pool 2.1 {seed}")
    scenes = [draw(rng) for _ in range(size)]
    edits = [draw_rgba_edit(rng) for _ in range(size)]
    if not path.exists():
        log.info("encoding %d images", 3 * size)
        images = [[paint(scene, rng)] for scene in scenes]
        pairs = [paint_edit(edit, f"edit {i}")[::-1] for i, edit in enumerate(edits)]
        torch.save([_encode(images, vae), _encode(pairs, vae)], path)
    scene_latents, edit_latents = torch.load(path, weights_only=True)
    return Pool(scenes, scene_latents, edits, edit_latents)


def _encode(rows: Sequence[Sequence[np.ndarray]], vae: AutoencoderKLQwenImage21) -> Tensor:
    images = [image for row in rows for image in row]
    starts = range(0, len(images), ENCODED_AT_ONCE)
    parts = [encode(vae, np.stack(images[start : start + ENCODED_AT_ONCE])).half() for start in starts]
    return torch.cat(parts).unflatten(0, (len(rows), -1))


def draw_sigmas(count: int) -> Tensor:
    """Return sigmas spread as the sampler's are: one from each of `count` equal parts, then shifted."""
    slope = (SCHEDULER["max_shift"] - SCHEDULER["base_shift"]) / (
        SCHEDULER["max_image_seq_len"] - SCHEDULER["base_image_seq_len"]
    )
    shift = math.exp(SCHEDULER["base_shift"] + slope * (GRID * GRID - SCHEDULER["base_image_seq_len"]))
    uniform = (torch.arange(count) + torch.rand(count)) / count
    return shift * uniform / (1 + (shift - 1) * uniform)


def train_transformer(
    path: Path, pool: Pool, embed: Embeddings, *, seconds: float, seed: int
) -> QwenImage21Transformer2DModel:
    """Return the trained transformer in float32, its weights the moving average."""
    torch.manual_seed(seed)
    model = build_transformer()
    # Muon multiplies in bf16, which takes longer than the step itself where a CPU has none
    named = model.named_parameters() if has_bf16() else ()
    matrices = [p for name, p in named if name.startswith("transformer_blocks") and p.ndim == 2]
    run = TimedRun(model, path, seconds=seconds, lr=1.5e-3, decay=0.99, matrices=matrices)
    torch.manual_seed(seed + run.step)
    rng = random.Random(f"flow 2.1 {seed} {run.step}")
    for step in run.steps():
        editing = step % 2 == 1
        texts, latents = (_edits if editing else _captions)(pool, rng)
        texts = [" " if rng.random() < DROPPED else text for text in texts]
        errors = flow_errors(model, latents, *embed(texts, shown=editing))
        run.update(errors.mean(), **{"edits" if editing else "captions": errors.mean()})
    run.use_average()
    return model


def _captions(pool: Pool, rng: random.Random) -> tuple[list[str], Tensor]:
    chosen = rng.choices(range(len(pool.scenes)), k=BATCH)
    scenes = [forget_some_facts(pool.scenes[i], rng) for i in chosen]
    return [caption(scene, rng.choice(LANGUAGES), rng) for scene in scenes], pool.scene_latents[chosen].float()


def _edits(pool: Pool, rng: random.Random) -> tuple[list[str], Tensor]:
    """Every other edit is done the other way round."""
    chosen = rng.choices(range(len(pool.edits)), k=BATCH)
    edits, latents = [pool.edits[i] for i in chosen], pool.edit_latents[chosen].float()
    edits[::2] = [edit.back for edit in edits[::2]]
    latents[::2] = latents[::2].flip(1)
    return [word(order_of(edit, rng), rng.choice(LANGUAGES), rng) for edit in edits], latents


def flow_errors(
    model: QwenImage21Transformer2DModel,
    latents: Tensor,
    embeds: Tensor,
    mask: Tensor,
    slots: Tensor,
    *,
    copies: int = COPIES,
) -> Tensor:
    """Return the squared error of the predicted velocity by image, noise and token, (B, copies, tokens); the noisiest
    come last."""
    wanted, shown = latents[:, 0], latents[:, 1:].flatten(1, 2)
    noise = torch.randn(len(wanted), copies, *wanted.shape[1:])
    sigmas = draw_sigmas(len(wanted))
    velocity = noise - wanted[:, None]
    noisy = wanted[:, None] + sigmas[:, None, None, None] * velocity
    with lower_precision():
        predicted = predict(model, noisy, sigmas, shown=shown, embeds=embeds, mask=mask, slots=slots)
    return (predicted.float() - velocity).square().mean(-1)
