"""Cut the Qwen2.5 tokenizer down to what the templates and captions use, every string tokenised as the full one does.

Run once, by hand: `python tools/miniature/tokenizer.py FULL_TOKENIZER_FOLDER OUT`. Training starts from the result.
With --edit it is the editing miniature's, which knows the words of instructions as well.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

from transformers import Qwen2Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from miniature.data import LANGUAGES, caption, draw_scene, forget_some_facts
from miniature.edits import every_order, instruction

# the pipelines' own templates, so that the 34 and 64 tokens that they drop are the same here
TEXT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
EDIT_WORDS = (
    "Picture 1: <|vision_start|><|image_pad|><|vision_end|>Picture 2: <|vision_start|><|image_pad|><|vision_end|>"
    "make the circle red, change the colour of the background to blue, move it to the left, turn into a square"
    "把圆形变成红色，把背景改成蓝色"
)
IMAGES = {
    n: "".join(f"Picture {i}: <|vision_start|><|image_pad|><|vision_end|>" for i in range(1, n + 1)) for n in (1, 2)
}
TEXT_PREFIX_TOKENS, EDIT_PREFIX_TOKENS = 34, 64
SAMPLES = 20_000
WORDINGS = 41  # of each order, odd: both languages get their share


def prune(full_folder: Path, texts: list[str], out: Path) -> Qwen2Tokenizer:
    """Write to `out` the tokenizer whose vocabulary is the 256 bytes and the closure of the merges that `texts` use."""
    full = Qwen2Tokenizer.from_pretrained(full_folder)
    vocabulary = json.loads((full_folder / "vocab.json").read_text(encoding="utf-8"))
    merges = [tuple(line.split(" ")) for line in (full_folder / "merges.txt").read_text(encoding="utf-8").splitlines()]
    merges = [merge for merge in merges if len(merge) == 2 and merge[0] != "#version:"]
    parts = {a + b: (a, b) for a, b in reversed(merges)}

    pending = {t for text in texts for t in full.convert_ids_to_tokens(full(text).input_ids) if t in vocabulary}
    needed = {token for token, index in vocabulary.items() if index < 256}
    while pending:
        token = pending.pop()
        if token not in needed:
            needed.add(token)
            pending.update(parts.get(token, ()))
    renumbered = {token: i for i, token in enumerate(sorted(needed, key=vocabulary.get))}
    kept = [merge for merge in merges if {*merge, "".join(merge)} <= needed]

    config = json.loads((full_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = sorted(config["added_tokens_decoder"].items(), key=lambda entry: int(entry[0]))
    config["added_tokens_decoder"] = {str(len(renumbered) + i): token for i, (_, token) in enumerate(added)}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        (source / "vocab.json").write_text(json.dumps(renumbered, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in kept)]
        (source / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (source / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        small = Qwen2Tokenizer.from_pretrained(source)
    small.save_pretrained(out)
    for text in texts:
        want, got = (t.convert_ids_to_tokens(t(text).input_ids) for t in (full, small))
        if want != got:
            raise ValueError(f"{text!r} is tokenised as {got}, by the full tokenizer as {want}.")
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("full", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--edit", action="store_true")
    arguments = parser.parse_args()
    rng = random.Random(0)
    texts = {TEXT_TEMPLATE.format(" "), TEXT_TEMPLATE.format(""), EDIT_TEMPLATE.format(EDIT_WORDS)}
    for i in range(SAMPLES):
        scene = forget_some_facts(draw_scene(rng, held_out=i % 2 == 0), rng)
        texts.update(TEXT_TEMPLATE.format(caption(scene, language, rng)) for language in LANGUAGES)
    if arguments.edit:
        texts.update(EDIT_TEMPLATE.format(IMAGES[n] + " ") for n in IMAGES)
        for i, order in enumerate(every_order() * WORDINGS):
            text = instruction(order, LANGUAGES[i % len(LANGUAGES)], rng)
            texts.update(EDIT_TEMPLATE.format(IMAGES[n] + text) for n in IMAGES)
    small = prune(arguments.full, sorted(texts), arguments.out)
    print(f"{len(small)} tokens, {len(texts)} texts tokenised as by the full tokenizer")


if __name__ == "__main__":
    main()
