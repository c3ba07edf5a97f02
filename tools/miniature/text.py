"""Train the text encoder: its last tokens learn to say what is where, so that the transformer can look it up."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from .data import COLOURS, LANGUAGES, PLACES, SHAPES, SIZES, Item, Scene, caption, draw_scene, forget_some_facts
from .models import TEXT_HIDDEN, build_text_encoder
from .run import TimedRun, log
from .tokenizer import TEXT_PREFIX_TOKENS, TEXT_TEMPLATE

BATCH = 96
SUFFIX_TOKENS = 5  # <|im_end|> \n <|im_start|> assistant \n: they come after the caption, so they have read all of it

LAYOUTS = (*PLACES, "beside", "stacked")
NOTHING = "nothing"  # there is no second shape, or its size is not said
ANSWERS = {
    "background": tuple(COLOURS),
    "layout": LAYOUTS,
    "first shape": SHAPES,
    "first colour": tuple(COLOURS),
    "first size": (*SIZES, NOTHING),
    "second shape": (*SHAPES, NOTHING),
    "second colour": (*COLOURS, NOTHING),
    "second size": (*SIZES, NOTHING),
}


def answers(scene: Scene) -> list[int]:
    """Return the index of each right answer in ANSWERS; `first` is the shape further left, or further up."""
    items = scene.items[::-1] if scene.place in ("right", "below") and len(scene.items) == 2 else scene.items
    if len(items) == 2:
        layout = "beside" if scene.place in ("left", "right") else "stacked"
    else:
        items, layout = (*items, Item(NOTHING, NOTHING, NOTHING)), scene.place or "centre"
    right = [scene.background, layout]
    for item in items:
        right += [item.shape, item.colour, item.size or NOTHING]
    return [values.index(value) for values, value in zip(ANSWERS.values(), right, strict=True)]


class Reader(nn.Module):
    """The text encoder with one linear question per fact; only the encoder is kept."""

    def __init__(self, encoder: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.encoder = encoder
        self.questions = nn.Linear(TEXT_HIDDEN, sum(map(len, ANSWERS.values())))

    def forward(self, tokens: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the logits of every question at every suffix token, (B, SUFFIX_TOKENS, answers) each."""
        hidden = self.encoder.model(**tokens).last_hidden_state
        ends = tokens["attention_mask"].sum(1)
        at = ends[:, None] - 1 - torch.arange(SUFFIX_TOKENS, device=ends.device)
        suffix = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.questions(suffix).split([len(v) for v in ANSWERS.values()], dim=-1)


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: list[str], device: torch.device) -> dict[str, torch.Tensor]:
    texts = [TEXT_TEMPLATE.format(c) for c in captions]
    return dict(tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(device))


@torch.no_grad()
def embed(
    encoder: Qwen2_5_VLForConditionalGeneration, tokens: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prompt embeddings after the template's prefix, (B, T, hidden), and their mask, (B, T) bool."""
    hidden = encoder.model(**tokens).last_hidden_state[:, TEXT_PREFIX_TOKENS:]
    mask = tokens["attention_mask"][:, TEXT_PREFIX_TOKENS:].bool()
    return hidden * mask[..., None], mask


def train_text_encoder(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, seconds: float, seed: int, device: torch.device
) -> Qwen2_5_VLForConditionalGeneration:
    """Return the trained text encoder in float32, frozen."""
    torch.manual_seed(seed)
    encoder = build_text_encoder(tokenizer)
    encoder.model.visual.requires_grad_(False)
    reader = Reader(encoder).to(device)
    run = TimedRun(reader, path, seconds=seconds, lr=2e-3, decay=0.99, warmup_steps=50)
    rng = random.Random(f"text {seed} {run.step}")
    for _ in run.steps():
        loss, right = _ask(reader, tokenizer, rng, device, held_out=False)
        run.update(loss, right=right)
    run.use_average()
    with torch.no_grad():
        _, right = _ask(reader, tokenizer, random.Random(seed), device, held_out=True)
    log.info("text: %.1f %% of held-out captions read without an error", 100 * right)
    return encoder.requires_grad_(False).eval()


def _ask(
    reader: Reader, tokenizer: PreTrainedTokenizerBase, rng: random.Random, device: torch.device, *, held_out: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean cross entropy, and the part of captions whose last token answers every question right."""
    scenes = [forget_some_facts(draw_scene(rng, held_out=held_out), rng) for _ in range(BATCH)]
    tokens = tokenize(tokenizer, [caption(s, rng.choice(LANGUAGES), rng) for s in scenes], device)
    wanted = torch.tensor([answers(s) for s in scenes], device=device)
    logits = reader(tokens)
    losses = [
        nn.functional.cross_entropy(part.flatten(0, 1).float(), wanted[:, i].repeat_interleave(SUFFIX_TOKENS))
        for i, part in enumerate(logits)
    ]
    right = torch.stack([part[:, 0].argmax(-1) == wanted[:, i] for i, part in enumerate(logits)]).all(0)
    return torch.stack(losses).mean(), right.float().mean()
