"""Train the transformer to edit: flow matching on the wanted image's latents, those of the shown beside them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor, nn

from .data import LANGUAGES
from .edit_text import Embeddings
from .edits import KINDS, Edit, draw_edit, instruction, order_of, paint_edit
from .flow import GRID, attend, draw_sigmas, weigh
from .run import TimedRun, log
from .vae import encode, to_tensor

BATCH = 32
WHOLE_PART, WHOLE_BATCH = 0.08, 16  # of the time: the end, with every token of the images
POOL = 4500  # edits, encoded once; they are worded anew each time
ENCODED_AT_ONCE = 64
DROPPED_TO_SPACE = 0.1
TOKENS = GRID * GRID


@dataclass(frozen=True)
class EditPool:
    """Edits of one image, or of two, and the latents of each: the wanted image's, then those of the shown,
    (N, 1 + shown, 64, 64) float16."""

    edits: list[Edit]
    latents: Tensor

    @property
    def shown(self) -> int:
        return self.latents.shape[1] - 1


def build_pools(path: Path, vae: AutoencoderKLQwenImage, *, seed: int, size: int = POOL) -> list[EditPool]:
    """Draw and encode the training edits, of one image and of two; the latents are kept for a resumed run."""
    rng = random.Random(f"edit pool {seed}")
    edits = [draw_edit(rng, KINDS[i % len(KINDS)], held_out=False) for i in range(size)]
    groups = [[e for e in edits if len(e.sources) == shown] for shown in (1, 2)]
    if not path.exists():
        log.info("encoding the images of %d edits", size)
        torch.save([_encode(group, vae) for group in groups], path)
    latents = torch.load(path, weights_only=True)
    return [EditPool(group, part) for group, part in zip(groups, latents, strict=True)]


def _encode(edits: list[Edit], vae: AutoencoderKLQwenImage) -> Tensor:
    images = []
    for i, edit in enumerate(edits):
        sources, target = paint_edit(edit, f"edit {i}")
        images += [target, *sources]
    parts = []
    for start in range(0, len(images), ENCODED_AT_ONCE):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(encode(vae, to_tensor(np.stack(images[start : start + ENCODED_AT_ONCE]))).half())
    return torch.cat(parts).view(len(edits), -1, TOKENS, 64)


class ThinnedPositions(nn.Module):
    """The transformer's position embedding for text tokens of which some are left out."""

    def __init__(self, inner: nn.Module, places: Tensor) -> None:
        super().__init__()
        self.inner, self.places = inner, places

    def forward(self, shapes: list, *, max_txt_seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        images, text = self.inner(shapes, max_txt_seq_len=int(self.places[-1]) + 1, device=device)
        return images, text[self.places]


def train_editing(
    path: Path,
    model: QwenImageTransformer2DModel,
    pools: list[EditPool],
    embed: Embeddings,
    *,
    seconds: float,
    seed: int,
) -> QwenImageTransformer2DModel:
    """Return the transformer that edits, in float32, its weights the moving average."""
    torch.manual_seed(seed)
    matrices = [p for name, p in model.named_parameters() if name.startswith("transformer_blocks") and p.ndim == 2]
    run = TimedRun(model, path, seconds=seconds, lr=1.5e-3, decay=0.995, matrices=matrices)
    torch.manual_seed(seed + run.step)
    rng = random.Random(f"edit flow {seed} {run.step}")
    fused, rope = transformer_qwenimage.dispatch_attention_fn, model.pos_embed
    try:
        for step in run.steps():
            thinned = run.used_seconds < (1 - WHOLE_PART) * seconds
            count = BATCH if thinned else WHOLE_BATCH
            # two thirds of the edits show one image
            edits, latents = _draw(pools[step % 3 == 2], count, rng)
            texts = [" " if rng.random() < DROPPED_TO_SPACE else _word(edit, rng) for edit in edits]
            embeds, mask, places, amounts = embed(texts, latents.shape[1] - 1, thinned=thinned)
            model.pos_embed = ThinnedPositions(rope, places)
            bias = torch.cat([amounts, torch.zeros(latents.shape[1] * TOKENS)])
            transformer_qwenimage.dispatch_attention_fn = partial(attend, bias=bias)
            errors = edit_errors(model, latents, embeds, mask)
            weights = torch.from_numpy(np.stack([weigh(edit.target) for edit in edits]))
            values = {f"plain{latents.shape[1] - 1}": errors.mean(), "coarse": errors[-count // 4 :].mean()}
            run.update((errors * weights).mean(), **values)
    finally:
        transformer_qwenimage.dispatch_attention_fn, model.pos_embed = fused, rope
    run.use_average()
    return model


def _draw(pool: EditPool, count: int, rng: random.Random) -> tuple[list[Edit], Tensor]:
    """Return edits and their latents; every other one is done the other way round, or shows its two images so."""
    chosen = rng.choices(range(len(pool.edits)), k=count)
    edits, latents = [pool.edits[i] for i in chosen], pool.latents[chosen].float()
    edits[::2] = [edit.back if pool.shown == 1 else edit.turned for edit in edits[::2]]
    latents[::2] = latents[::2].flip(1) if pool.shown == 1 else latents[::2][:, [0, 2, 1]]
    return edits, latents


def _word(edit: Edit, rng: random.Random) -> str:
    return instruction(order_of(edit, rng), rng.choice(LANGUAGES), rng)


def edit_errors(model: QwenImageTransformer2DModel, latents: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
    """Return the squared error of the predicted velocity by image and token, (B, tokens); the noisiest come last."""
    wanted, shown = latents[:, 0], latents[:, 1:].flatten(1, 2)
    noise = torch.randn_like(wanted)
    sigmas = draw_sigmas(len(wanted), wanted.device)
    noisy = wanted + sigmas[:, None, None] * (noise - wanted)
    with torch.autocast(wanted.device.type, torch.bfloat16):
        velocity = model(
            hidden_states=torch.cat([noisy, shown], dim=1),
            timestep=sigmas,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, GRID, GRID)] * latents.shape[1]] * len(latents),
            return_dict=False,
        )[0][:, :TOKENS]
    return (velocity.float() - (noise - wanted)).square().mean(-1)
