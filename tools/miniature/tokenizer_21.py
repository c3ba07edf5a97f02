"""Cut the Qwen tokenizer down to what 2.1's templates, captions and instructions use."""

from __future__ import annotations

import random
from pathlib import Path

from .data import LANGUAGES, caption, draw_scene, forget_some_facts
from .edits import every_order, instruction
from .rgba import CHINESE_REMOVALS, ENGLISH_REMOVALS, TRANSPARENT, draw
from .text_21 import IMAGE, PROMPT
from .tokenizer import prune

SAMPLES, WORDINGS = 4000, 21


def write_tokenizer(full: Path, out: Path) -> None:
    """From the files of the full one, so that every text of the miniature's is tokenised as by it."""
    rng = random.Random(0)
    texts = {PROMPT.format(text) for text in ("", " ", IMAGE, IMAGE + " ")}
    for i in range(SAMPLES):
        scene = forget_some_facts(draw(rng) if i % 2 else draw_scene(rng, held_out=True), rng)
        texts.update(PROMPT.format(caption(scene, language, rng)) for language in LANGUAGES)
    for i, order in enumerate(every_order() * WORDINGS):
        texts.add(PROMPT.format(IMAGE + instruction(order, LANGUAGES[i % len(LANGUAGES)], rng)))
    texts.update(PROMPT.format(IMAGE + text) for text in (*ENGLISH_REMOVALS, *CHINESE_REMOVALS))
    texts.add(PROMPT.format(f"a {TRANSPARENT} background"))
    prune(full, sorted(texts), out)
