"""Own 2.1's transformer as it is trained: several noisy images behind one prompt, which is computed once for all.

Prompt and shown image see neither the timestep nor what is made, so that a caption of twenty tokens costs as much for
four images as for one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage21 import apply_rotary_emb_qwen
from torch import Tensor

from .flow import attend

TOKENS_OF_SLOT = 4


class Attention:
    """Of blocks over one sequence. seen: (B, 1, S, S) bool, True where a token sees another."""

    def __init__(self, seen: Tensor) -> None:
        self._seen = seen

    def __call__(self, attn: Any, hidden_states: Tensor, *, rotary_emb: Tensor, **_: object) -> Tensor:
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            apply_rotary_emb_qwen(norm(states).to(value.dtype), rotary_emb, use_real=False)
            for norm, states in ((attn.norm_q, query), (attn.norm_k, key))
        )
        return attn.to_out[0](attend(query, key, value, self._seen).flatten(2))


def sight(mask: Tensor, image: Tensor, copies: int, tokens: int) -> Tensor:
    """Return what sees what, (B, 1, S, S) bool, of a prefix and `copies` images of `tokens` each behind it.

    mask: (B, P) bool, False for padding; image: (P) bool, True for the tokens of the one image shown. Text sees what
    stands before it, images themselves too, and each copy the prefix and itself.
    """
    prefix = len(image)
    ends = torch.arange(prefix) + 1
    if image.any():
        ends[image] = ends[image].max()
    seen = torch.zeros(prefix + copies * tokens, prefix + copies * tokens, dtype=torch.bool)
    seen[:prefix, :prefix] = torch.arange(prefix) < ends[:, None]
    seen[prefix:, :prefix] = True
    seen[prefix:, prefix:] = (
        torch.eye(copies, dtype=torch.bool).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    )
    known = torch.cat([mask, mask.new_ones(len(mask), copies * tokens)], dim=1)
    return seen & known[:, None, None]


def predict(
    model: QwenImage21Transformer2DModel,
    noisy: Tensor,
    sigmas: Tensor,
    *,
    shown: Tensor,
    embeds: Tensor,
    mask: Tensor,
    slots: Tensor,
) -> Tensor:
    """Return the velocities of `noisy` (B, copies, tokens, 64), of its shape.

    sigmas: (B); shown: latents of the image shown (B, tokens, 64), or of none (B, 0, 64), at `slots` (T) bool of the
    text; embeds: (B, T, hidden), mask: (B, T) bool. Images are square.
    """
    copies, tokens = noisy.shape[1:3]
    side = math.isqrt(tokens)
    repeats = torch.where(slots, TOKENS_OF_SLOT, 1)
    image = slots.repeat_interleave(repeats)
    images = model.img_in(torch.cat([shown, noisy.flatten(1, 2)], dim=1))
    prefix = model.txt_in(embeds).repeat_interleave(repeats, dim=1)
    prefix[:, image] = images[:, : shown.shape[1]]
    states = torch.cat([prefix, images[:, shown.shape[1] :]], dim=1)

    shapes = [(1, side, side)] * (2 if image.any() else 1)
    places = model.pos_embed(shapes, torch.cat([image, image.new_ones(tokens)]), device=states.device)
    places = torch.cat([places[:-tokens], *[places[-tokens:]] * copies])
    attention = Attention(sight(mask.repeat_interleave(repeats, dim=1) | image, image, copies, tokens))
    made = torch.arange(states.shape[1]) >= len(image)
    embedded = model.time_text_embed(torch.cat([sigmas, sigmas.new_zeros(1)]), states)
    modulation = model.modulation(embedded)
    for block in model.transformer_blocks:
        block.attn.set_processor(attention)
        states = block(states, modulation=modulation, rotary_emb=places, target_token_mask=made)
    states = model.norm_out(states[:, len(image) :], embedded, made[len(image) :])
    return model.proj_out(states).unflatten(1, (copies, tokens))
