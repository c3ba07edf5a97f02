"""Train the text encoder to read instructions behind images, and embed them as the editing pipeline does.

The vision tower is made to say nothing: each of an image's 196 tokens is the same to the language model. While
training, a few of them stand for all: they keep their places, and count as often as they stand for others.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from .data import COLOURS, LANGUAGES, SHAPES
from .edits import KINDS, Order, draw_edit, instruction, order_of
from .models import TEXT_HIDDEN, build_text_encoder
from .run import TimedRun, log
from .text import NOTHING, SUFFIX_TOKENS
from .tokenizer import EDIT_PREFIX_TOKENS, EDIT_TEMPLATE, IMAGES

BATCH = 64
SIDE = 14  # tokens along an image that the pipeline shows at 384x384, which the processor makes 392x392
STANDS_FOR = 28  # so many tokens of an image does each one that is kept while training stand for
ANSWERS = {
    "kind": KINDS,
    "shape": (*SHAPES, NOTHING),
    "colour": (*COLOURS, NOTHING),
    "wanted": (*COLOURS, NOTHING),
    "kept": (0, 1, NOTHING),
}


@dataclass(frozen=True)
class Prompts:
    """Token ids (B, S), padded at the end, of instructions that show the same number of images; which tokens are
    images' (S), all tokens' positions (3, S), and how many tokens each has (B)."""

    ids: Tensor
    images: Tensor
    positions: Tensor
    lengths: Tensor

    @property
    def places(self) -> Tensor:
        """Of all tokens but those of images that another stands for."""
        number = self.images.cumsum(0) - 1
        return (~self.images | (number % STANDS_FOR == STANDS_FOR // 2)).nonzero()[:, 0]

    @property
    def weights(self) -> Tensor:
        """The logarithm of how many tokens each of `places` stands for."""
        return self.images[self.places] * math.log(STANDS_FOR)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], shown: int) -> Prompts:
    rows = [tokenizer(EDIT_TEMPLATE.format(IMAGES[shown] + text)).input_ids for text in texts]
    place, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|image_pad|>", "<|endoftext|>"))
    rows = [[i for token in row for i in [token] * (SIDE * SIDE if token == place else 1)] for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [pad] * (int(lengths.max()) - len(row)) for row in rows])
    images = ids[0] == place
    return Prompts(ids, images, positions(images.tolist()), lengths)


def positions(images: list[bool]) -> Tensor:
    """Return (3, S): an image stands still in time, and the text behind it goes on after its longer side."""
    parts, at, begin = [], 0, 0
    while at < len(images):
        if images[at]:
            rows, columns = (axis.flatten() for axis in torch.meshgrid([torch.arange(SIDE)] * 2, indexing="ij"))
            parts.append(torch.stack([torch.zeros_like(rows), rows, columns]) + begin)
            at, begin = at + SIDE * SIDE, begin + SIDE
        else:
            parts.append(torch.full((3, 1), begin))
            at, begin = at + 1, begin + 1
    return torch.cat(parts, dim=1)


def read(encoder: Qwen2_5_VLForConditionalGeneration, prompts: Prompts, *, thinned: bool) -> Tensor:
    """Return the hidden states of all tokens, or of those at `places`, (B, S, hidden)."""
    everything = torch.arange(prompts.ids.shape[1])
    places = prompts.places if thinned else everything
    embeds = encoder.model.language_model.embed_tokens(prompts.ids[:, places])
    embeds = embeds.masked_fill(prompts.images[places][:, None], 0)
    weights = prompts.weights if thinned else torch.zeros(len(places))
    later = torch.ones(len(places), len(places), dtype=torch.bool).triu(1)
    mask = weights.expand(len(places), -1).masked_fill(later, -math.inf)
    where = prompts.positions[:, None, places].expand(-1, len(embeds), -1)
    return encoder.model.language_model(
        inputs_embeds=embeds, position_ids=where, attention_mask={"full_attention": mask[None, None]}, use_cache=False
    ).last_hidden_state


def answers(order: Order) -> list[int]:
    """Return the index of each right answer in ANSWERS."""
    said = (order.kind, order.shape, order.colour, order.wanted, order.kept)
    return [
        values.index(NOTHING if value is None else value) for values, value in zip(ANSWERS.values(), said, strict=True)
    ]


class Reader(nn.Module):
    """The text encoder with one linear question per fact; only the encoder is kept."""

    def __init__(self, encoder: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.encoder = encoder
        self.questions = nn.Linear(TEXT_HIDDEN, sum(map(len, ANSWERS.values())))

    def forward(self, prompts: Prompts) -> tuple[Tensor, ...]:
        """Return the logits of every question at every suffix token, (B, SUFFIX_TOKENS, answers) each."""
        hidden = read(self.encoder, prompts, thinned=True)
        ends = prompts.lengths - (prompts.ids.shape[1] - hidden.shape[1])
        at = ends[:, None] - 1 - torch.arange(SUFFIX_TOKENS)
        suffix = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.questions(suffix).split([len(v) for v in ANSWERS.values()], dim=-1)


def build_edit_encoder(
    drawing: Qwen2_5_VLForConditionalGeneration,
    known: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
) -> Qwen2_5_VLForConditionalGeneration:
    """Return the drawing miniature's encoder with `tokenizer`'s vocabulary and a vision tower that says nothing."""
    encoder = build_text_encoder(tokenizer)
    state, fresh = drawing.float().state_dict(), encoder.state_dict()
    old, new = known.get_vocab(), tokenizer.get_vocab()
    for name, weight in state.items():
        if weight.shape == fresh[name].shape:
            fresh[name].copy_(weight)
        else:
            for token, index in new.items():
                if token in old:
                    fresh[name][index] = weight[old[token]]
    for parameter in encoder.model.visual.merger.mlp[2].parameters():
        parameter.data.zero_()
    encoder.model.visual.requires_grad_(False)
    return encoder


def train_edit_encoder(
    path: Path,
    encoder: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seconds: float,
    seed: int,
) -> Qwen2_5_VLForConditionalGeneration:
    """Return the text encoder that reads instructions, in float32, frozen."""
    torch.manual_seed(seed)
    reader = Reader(encoder)
    run = TimedRun(reader, path, seconds=seconds, lr=2e-3, decay=0.99, warmup_steps=50)
    rng = random.Random(f"edit text {seed} {run.step}")
    for _ in run.steps():
        loss, right = _ask(reader, tokenizer, rng)
        run.update(loss, right=right)
    run.use_average()
    with torch.no_grad():
        rights = torch.stack([_ask(reader, tokenizer, random.Random(i))[1] for i in range(6)])
    log.info("edit text: %.1f %% of instructions read without an error", 100 * rights.mean())
    return encoder.requires_grad_(False).eval()


def _ask(reader: Reader, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropy, and the part of instructions whose last token answers every question right."""
    shown = rng.choice((1, 1, 2))
    kinds = KINDS[:2] if shown == 1 else KINDS[2:]
    orders = [order_of(draw_edit(rng, rng.choice(kinds), held_out=False), rng) for _ in range(BATCH)]
    texts = [instruction(order, rng.choice(LANGUAGES), rng) for order in orders]
    wanted = torch.tensor([answers(order) for order in orders])
    logits = reader(tokenize(tokenizer, texts, shown))
    losses = [
        nn.functional.cross_entropy(part.flatten(0, 1).float(), wanted[:, i].repeat_interleave(SUFFIX_TOKENS))
        for i, part in enumerate(logits)
    ]
    right = torch.stack([part[:, 0].argmax(-1) == wanted[:, i] for i, part in enumerate(logits)]).all(0)
    return torch.stack(losses).mean(), right.float().mean()


class Embeddings:
    """Instructions as the pipeline embeds them, each read once; what lies behind the template's prefix."""

    def __init__(self, encoder: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoder, self._tokenizer = encoder, tokenizer
        self._known: dict[tuple[int, str], Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: list[str], shown: int, *, thinned: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return embeddings (B, T, hidden), their mask (B, T) bool, and of the T tokens the places in the whole prompt
        and the logarithm of how many each stands for."""
        for text in texts:
            if (shown, text) not in self._known:
                prompts = tokenize(self._tokenizer, [text], shown)
                self._known[shown, text] = read(self._encoder, prompts, thinned=False)[0, EDIT_PREFIX_TOKENS:]
        rows = [self._known[shown, text] for text in texts]
        longest = max(texts, key=lambda text: len(self._known[shown, text]))
        layout = tokenize(self._tokenizer, [longest], shown)
        places, weights = layout.places, layout.weights
        if not thinned:
            places = torch.arange(layout.ids.shape[1])
            weights = torch.zeros(len(places))
        behind = places >= EDIT_PREFIX_TOKENS
        places, weights = places[behind] - EDIT_PREFIX_TOKENS, weights[behind]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return padded[:, places], mask[:, places], places, weights
