"""Prompts to token ids: the template, the tokenizer, and which tokens of the embeddings belong to the prompt."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InvalidRequest, WrongModel
from ...log import logger
from ...texts import half_character, shown
from ..qwen_vl.image_prompts import IMAGE, require_places
from ..qwen_vl.tokenizer_files import read_tokenizer
from .positions import MAX_POSITIONS
from .prompt_template import (
    EDIT_TEMPLATE,
    EDIT_TEMPLATE_TOKENS,
    IMAGE_PLACE,
    MAX_PROMPT_TOKENS,
    PROMPT_TEMPLATE,
    PROMPT_TEMPLATE_TOKENS,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer


# longer words than these make a token are in no language
MAX_PROMPT_CHARACTERS = MAX_POSITIONS * 16
# Small models have tokenizers of their own; one of at least so many tokens makes of this text Qwen2.5's, or is another
# model's. Each part is split, normalized or merged otherwise by some.
FULL_VOCABULARY = 100_000
PROBE = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    "Picture 1: it'Somewhere 2024 e\u0301 \u212b  two\n\n\tlines "
    "Grüße, photorealistic 把圆形变成红色 Здравствуйте こんにちは مرحبا 안녕하세요 🐈 unbelievableness<|im_end|>\n"
)
PROBE_DIGEST = "8be9e9ba9a7ac9a1"  # of the ids in decimal, with commas


class PromptTokenizer:
    """Qwen-Image's prompt template around the tokenizer of a pipeline folder, or the one that ComfyUI ships."""

    def __init__(self, folder: Path) -> None:
        """Raises MissingFile where the folder holds no tokenizer, DamagedFile where one of its files is none, and
        WrongModel where it is another model's."""
        self._tokenizer = read_tokenizer(folder)
        templates = ((PROMPT_TEMPLATE, PROMPT_TEMPLATE_TOKENS), (EDIT_TEMPLATE, EDIT_TEMPLATE_TOKENS))
        self._templates = []
        for text, count in templates:
            ids = self._ids(text.split("{}")[0])
            if len(ids) != count:
                raise WrongModel(
                    "{folder} holds another model's tokenizer: Qwen-Image's makes {count} tokens of the prompt "
                    "template's beginning, this one {given_count}. Use the tokenizer folder of Qwen-Image, or a text "
                    "encoder from models/text_encoders.",
                    code="tokenizer.other_template_tokens",
                    folder=folder,
                    count=count,
                    given_count=len(ids),
                )
            # the last token may join with the prompt's first characters
            self._templates.append((ids[: count - 1], count))
        _require_known(folder, self._tokenizer)
        self._image = self._tokenizer.token_to_id("<|image_pad|>")
        self._turn = self._ids("<|im_start|>user\n")  # the token that begins a turn, "user", line break

    def encode(self, prompt: str, *, template: str = PROMPT_TEMPLATE, images: int = 0) -> list[int]:
        """Token ids of the prompt within the template. A text that begins with <|im_start|> is its own template.

        The first places for images hold IMAGE, as many as there are images. No prompt is cut; a warning says
        when one is longer than the reference allows. Raises InvalidRequest where there are fewer places than images,
        and for what is no text, or one that is too long for the model.
        """
        require_text(prompt)
        text = prompt if prompt.startswith("<|im_start|>") else _filled(template, prompt)
        ids = self._ids(text)
        places = [i for i, token in enumerate(ids) if token == self._image]
        for i in places[:images]:
            ids[i] = IMAGE
        require_places(ids, images)
        length = len(ids) - self.start(ids)
        if length > MAX_PROMPT_TOKENS:
            logger.warning(
                "The prompt has %d tokens, the reference pipeline cuts at %d. It is used whole; the model has seen "
                "few as long.",
                length,
                MAX_PROMPT_TOKENS,
            )
        return ids

    def start(self, ids: Sequence[int]) -> int:
        """How many tokens stand before the prompt: 34 in Qwen-Image's template, 64 in the editing models', as the
        reference cuts them.

        In another template the first two turns' beginning counts, with "user" and the line break after it, as
        ComfyUI's own encoder finds it.
        """
        for known, count in self._templates:
            if list(ids[: count - 1]) == known:
                return count
        turns = [i for i, token in enumerate(ids) if token == self._turn[0]][:2]
        begin = turns[-1] if turns else 0
        return begin + 3 if list(ids[begin : begin + 3]) == self._turn and len(ids) > begin + 3 else begin

    def require_length(self, tokens: int) -> None:
        """Raise InvalidRequest for a prompt of more tokens than the model has positions for."""
        if tokens >= MAX_POSITIONS:
            raise InvalidRequest(
                "The prompt has {tokens} tokens; the model has positions for {most}, and has seen {most_seen}.\n\nWhat "
                "to do: shorten it.",
                code="prompt.too_many_tokens",
                tokens=tokens,
                most=MAX_POSITIONS - 1,
                most_seen=MAX_PROMPT_TOKENS,
            )

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)


def _require_known(folder: Path, tokenizer: "Tokenizer") -> None:
    ids = ",".join(map(str, tokenizer.encode(PROBE).ids))
    full = tokenizer.get_vocab_size(with_added_tokens=False) >= FULL_VOCABULARY
    if full and hashlib.sha256(ids.encode()).hexdigest()[:16] != PROBE_DIGEST:
        raise WrongModel(
            "{folder} holds another model's tokenizer: it makes other tokens than Qwen2.5's of the same text. Use the "
            "tokenizer folder of Qwen-Image, or a text encoder from models/text_encoders.",
            code="tokenizer.other_tokens",
            folder=folder,
        )


def require_text(prompt: object) -> None:
    """Raise InvalidRequest for what is no text of whole characters, and for a book; cuts nothing into tokens."""
    if not isinstance(prompt, str):
        raise InvalidRequest(
            "The prompt is {prompt}; a text is needed.\n\nWhat to do: check what is linked.",
            code="prompt.no_text",
            prompt=shown(prompt),
        )
    half = half_character(prompt)
    if half is not None:
        raise InvalidRequest(
            "The prompt's character {position} is one half of a character ({character!a}), which no encoding "
            "has.\n\nWhat to do: type it again, or remove it.",
            code="prompt.half_character",
            position=half + 1,
            character=prompt[half],
        )
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequest(
            "The prompt has {count} characters, more than the {most} that the model's positions have room for; it has "
            "seen {most_tokens} tokens.\n\nWhat to do: shorten it.",
            code="prompt.too_many_characters",
            count=len(prompt),
            most=MAX_PROMPT_CHARACTERS,
            most_tokens=MAX_PROMPT_TOKENS,
        )


def _filled(template: str, prompt: str) -> str:
    try:
        return template.format(prompt)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise InvalidRequest(
            "The template of the prompt cannot be filled in ({error}).\n\nWhat to do: mark the prompt's place in it "
            "with {{}}, and write other braces twice.",
            code="prompt.template_not_filled",
            error=error,
        ) from error


def with_places(prompt: str, images: int, *, labelled: bool) -> str:
    """A prompt that shows images before its text. `labelled`: as Picture 1, Picture 2, ..., as Edit-2509 and later
    ones were trained (pipeline_qwenimage_edit_plus.py); Edit was trained without (pipeline_qwenimage_edit.py)."""
    labels = [f"Picture {i + 1}: " if labelled else "" for i in range(images)]
    return "".join(label + IMAGE_PLACE for label in labels) + prompt
