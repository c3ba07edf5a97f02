"""Prompts to token ids: the template, the tokenizer, and which tokens of the embeddings belong to the prompt."""

from collections.abc import Sequence
from pathlib import Path

from ...errors import InvalidRequest, WrongModel
from ...log import logger
from ..qwen_vl.image_prompts import IMAGE, ImagePrompt, require_places
from ..qwen_vl.prompt_texts import filled, require_known, whole_text
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

# longer words than these make a token are in no language
MAX_PROMPT_CHARACTERS = MAX_POSITIONS * 16


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
                    "{folder} holds another model's tokenizer: Qwen-Image's makes {count} tokens from the beginning "
                    "of the prompt template, this one {given_count}. Use the tokenizer folder of Qwen-Image, or a "
                    "text encoder from models/text_encoders.",
                    code="tokenizer.other_template_tokens",
                    folder=folder,
                    count=count,
                    given_count=len(ids),
                )
            # the last token may join with the prompt's first characters
            self._templates.append((ids[: count - 1], count))
        require_known(folder, self._tokenizer)
        self._image = self._tokenizer.token_to_id("<|image_pad|>")
        self._turn = self._ids("<|im_start|>user\n")  # the token that begins a turn, "user", line break

    def encode(self, prompt: str, *, template: str = PROMPT_TEMPLATE, images: int = 0) -> list[int]:
        """Token ids of the prompt within the template. A text that begins with <|im_start|> is its own template.

        The first places for images hold IMAGE, as many as there are images. No prompt is cut; a warning says
        when one is longer than the reference allows. Raises InvalidRequest where there are fewer places than images,
        and for what is no text, or one that is too long for the model.
        """
        require_text(prompt)
        text = prompt if prompt.startswith("<|im_start|>") else filled(template, prompt)
        ids = self._ids(text)
        places = [i for i, token in enumerate(ids) if token == self._image]
        for i in places[:images]:
            ids[i] = IMAGE
        require_places(ids, images)
        length = len(ids) - self.start(ids)
        if length > MAX_PROMPT_TOKENS:
            logger.warning(
                "The prompt has %d tokens; the reference pipeline cuts it at %d. It is used in full, but the model has "
                "seen few that long.",
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

    def require_length(self, prompt: ImagePrompt) -> None:
        """Raise InvalidRequest for a prompt of more tokens than the model has positions for."""
        tokens = prompt.length - prompt.place(self.start(prompt.tokens))
        if tokens >= MAX_POSITIONS:
            raise InvalidRequest(
                "The prompt has {tokens} tokens; the model has positions for {most}, and was made for up to "
                "{most_seen}.\n\nWhat to do: shorten it.",
                code="prompt.too_many_tokens",
                tokens=tokens,
                most=MAX_POSITIONS - 1,
                most_seen=MAX_PROMPT_TOKENS,
            )

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)


def require_text(prompt: object) -> None:
    """Raise InvalidRequest for what is no text of whole characters, and for a book; cuts nothing into tokens."""
    text = whole_text(prompt)
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequest(
            "The prompt has {count} characters, more than the {most} that the model's positions have room for; it was "
            "made for up to {most_tokens} tokens.\n\nWhat to do: shorten it.",
            code="prompt.too_many_characters",
            count=len(text),
            most=MAX_PROMPT_CHARACTERS,
            most_tokens=MAX_PROMPT_TOKENS,
        )


def with_places(prompt: str, images: int, *, labelled: bool) -> str:
    """A prompt that shows images before its text. `labelled`: as Picture 1, Picture 2, ..., as Edit-2509 and later
    ones were trained (pipeline_qwenimage_edit_plus.py); Edit was trained without (pipeline_qwenimage_edit.py)."""
    labels = [f"Picture {i + 1}: " if labelled else "" for i in range(images)]
    return "".join(label + IMAGE_PLACE for label in labels) + prompt
