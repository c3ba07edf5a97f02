"""Build and train 2.1's text encoder in small: the state behind its last layer, at the template's last five tokens,
spells out what a caption or an instruction says. The vision part is made to say nothing: images act as latents alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from small_qwen3_vl import Size, make_qwen3_vl
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

from .data import COLOURS, LANGUAGES, PLACES, SHAPES, Scene, caption, forget_some_facts
from .edits import Order, order_of
from .rgba import KINDS, SIDE_PX, TRANSPARENT, draw, draw_rgba_edit, word
from .run import TimedRun, log
from .text import SUFFIX_TOKENS

BATCH = 96
HIDDEN = 128
# slots along an image: as many as its latents need, and as the published processor makes, which enlarges to 256x256
SIDE, SIDE_ENLARGED = SIDE_PX // 32, 8
SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
PROMPT = SYSTEM + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
IMAGE = "<image1><|vision_start|><|image_pad|><|vision_end|>"
_BACKGROUNDS = (*COLOURS, TRANSPARENT)
FACTS = {
    "background": _BACKGROUNDS,
    "place": PLACES,
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "kind": KINDS,
    "meant shape": SHAPES,
    "meant colour": tuple(COLOURS),
    "wanted": _BACKGROUNDS,
}
CODE = sum(map(len, FACTS.values()))  # of the hidden numbers: one for each value of each fact
SAID = 3.0  # where the fact has that value; elsewhere 0


@dataclass(frozen=True)
class Prompts:
    """Token ids (B, S), padded behind; which are slots (S); positions (3, S); tokens of each (B); how many are the
    system's."""

    ids: Tensor
    slots: Tensor
    positions: Tensor
    lengths: Tensor
    dropped: int


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, shown: bool, side: int = SIDE) -> Prompts:
    """Of captions, or of instructions behind an image that is shown, of side x side slots."""
    rows = [tokenizer(PROMPT.format((IMAGE if shown else "") + text)).input_ids for text in texts]
    slot, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|image_pad|>", "<|endoftext|>"))
    rows = [[i for token in row for i in [token] * (side * side if token == slot else 1)] for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [pad] * (int(lengths.max()) - len(row)) for row in rows])
    slots = ids[0] == slot
    return Prompts(ids, slots, _positions(slots, side), lengths, len(tokenizer(SYSTEM).input_ids))


def _positions(slots: Tensor, side: int) -> Tensor:
    """(3, S): slots stand still in time, and the text behind them goes on after the image's longer side."""
    places = torch.arange(len(slots)).repeat(3, 1)
    if slots.any():
        begin = int(slots.nonzero()[0])
        rows, columns = (axis.flatten() for axis in torch.meshgrid([torch.arange(side)] * 2, indexing="ij"))
        places[:, slots] = torch.stack([torch.zeros_like(rows), rows, columns]) + begin
        places[:, begin + side * side :] -= side * side - side
    return places


def read(encoder: Qwen3VLForConditionalGeneration, prompts: Prompts) -> Tensor:
    """The state behind the last layer, before the final norm, (B, S, hidden)."""
    model = encoder.model.language_model
    embeds = model.embed_tokens(prompts.ids).masked_fill(prompts.slots[:, None], 0)
    where = prompts.positions[:, None].expand(-1, len(embeds), -1)
    handle = model.norm.register_forward_hook(lambda module, inputs, output: inputs[0])
    try:
        return model(inputs_embeds=embeds, position_ids=where, use_cache=False).last_hidden_state
    finally:
        handle.remove()


def facts_of_scene(scene: Scene) -> dict[str, str]:
    """What a caption says, but for the size, which is always the same."""
    (item,) = scene.items
    place = scene.place or "centre"
    return {"background": scene.background, "place": place, "shape": item.shape, "colour": item.colour}


def facts_of_order(order: Order) -> dict[str, str]:
    """What an instruction says."""
    said = {
        "kind": order.kind,
        "meant shape": order.shape,
        "meant colour": order.colour,
        "wanted": order.wanted,
    }
    return {name: value for name, value in said.items() if value is not None}


def code_of(facts: dict[str, str]) -> Tensor:
    """(CODE,)"""
    return torch.cat(
        [torch.tensor([SAID * (facts.get(name) == value) for value in values]) for name, values in FACTS.items()]
    )


def build_text_encoder(tokenizer: PreTrainedTokenizerBase) -> Qwen3VLForConditionalGeneration:
    """Return an untrained encoder with the tokenizer's vocabulary, whose vision part says nothing."""
    size = Size(hidden=HIDDEN, layers=3, heads=4, kv_heads=4, intermediate=256)
    encoder = make_qwen3_vl(tokenizer, size)
    visual = encoder.model.visual
    for merger in (visual.merger, *visual.deepstack_merger_list):
        for parameter in merger.linear_fc2.parameters():
            nn.init.zeros_(parameter)
    visual.requires_grad_(False)
    encoder.lm_head.requires_grad_(False)
    return encoder


def train_text_encoder(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, seconds: float, seed: int
) -> Qwen3VLForConditionalGeneration:
    """Return the trained encoder in float32, frozen."""
    torch.manual_seed(seed)
    encoder = build_text_encoder(tokenizer)
    run = TimedRun(encoder, path, seconds=seconds, lr=2e-3, decay=0.99, warmup_steps=50)
    rng = random.Random(f"text 2.1 {seed} {run.step}")
    for step in run.steps():
        shown, side = step % 2 == 1, SIDE_ENLARGED if step % 4 == 3 else SIDE
        loss, right = _ask(encoder, tokenizer, rng, shown=shown, side=side)
        run.update(loss, **{"edits" if shown else "captions": right})
    run.use_average()
    with torch.no_grad():
        for shown in (False, True):
            _, right = _ask(encoder, tokenizer, random.Random(seed), shown=shown, side=SIDE)
            log.info("%s: %.1f %% read without an error", "edits" if shown else "captions", 100 * right)
    return encoder.requires_grad_(False).eval()


def _ask(
    encoder: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    *,
    shown: bool,
    side: int,
) -> tuple[Tensor, Tensor]:
    """Return the mean squared error of the code, and the part of texts whose last token spells every fact right."""
    texts, codes = [], []
    for _ in range(BATCH if side == SIDE else BATCH // 4):
        language = rng.choice(LANGUAGES)
        if shown:
            order = order_of(draw_rgba_edit(rng), rng)
            text, facts = word(order, language, rng), facts_of_order(order)
        else:
            scene = forget_some_facts(draw(rng), rng)
            text, facts = caption(scene, language, rng), facts_of_scene(scene)
        texts.append(text)
        codes.append(code_of(facts))
    prompts, wanted = tokenize(tokenizer, texts, shown=shown, side=side), torch.stack(codes)
    hidden = read(encoder, prompts)
    at = prompts.lengths[:, None] - 1 - torch.arange(SUFFIX_TOKENS)
    suffix = hidden.gather(1, at[..., None].expand(-1, -1, HIDDEN))
    error = (suffix[..., :CODE] - wanted[:, None]).square()
    loss = error.sum(-1).mean() / 8 + 0.01 * suffix[..., CODE:].square().mean()
    right = ((suffix[:, 0, :CODE] > SAID / 2) == (wanted > SAID / 2)).all(-1)
    return loss, right.float().mean()


class Embeddings:
    """What the transformer is given of texts, each read once: what stands behind the system's turn."""

    def __init__(self, encoder: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoder, self._tokenizer = encoder, tokenizer

    @torch.no_grad()
    def __call__(self, texts: list[str], *, shown: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings (B, T, hidden), 0 behind each text's end, their mask (B, T) bool, and which are slots
        (T)."""
        prompts = tokenize(self._tokenizer, texts, shown=shown)
        mask = torch.arange(prompts.ids.shape[1]) < prompts.lengths[:, None]
        hidden = read(self._encoder, prompts) * mask[..., None]
        return hidden[:, prompts.dropped :], mask[:, prompts.dropped :], prompts.slots[prompts.dropped :]
