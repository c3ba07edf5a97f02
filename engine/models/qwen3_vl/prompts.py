"""Prompts of Qwen-Image-2.1 to token ids: its template, the tokenizer, and which tokens belong to the prompt."""

from collections.abc import Sequence
from pathlib import Path

from ...errors import InvalidRequest
from ..qwen_vl.image_prompts import IMAGE, ImagePrompt, require_places
from ..qwen_vl.prompt_texts import filled, require_known, whole_text
from ..qwen_vl.tokenizer_files import read_tokenizer
from .prompt_template import PROMPT_TEMPLATE, SYSTEM_TURN, with_places

# of the transformer's table of rotary angles (diffusers transformer_qwenimage21.py)
MAX_POSITIONS = 8192
# longer words than these make a token are in no language
MAX_PROMPT_CHARACTERS = MAX_POSITIONS * 16


class PromptTokenizer:
    """Qwen-Image-2.1's prompt template around the tokenizer of a pipeline folder, or the one that ComfyUI ships, whose
    tokens are the same."""

    def __init__(self, folder: Path) -> None:
        """Raises MissingFile where the folder holds no tokenizer, DamagedFile where one of its files is none, and
        WrongModel where it is another model's."""
        self._tokenizer = read_tokenizer(folder)
        require_known(folder, self._tokenizer)
        self._image = self._tokenizer.token_to_id("<|image_pad|>")
        self._system = self._ids(SYSTEM_TURN)[:2]  # the token that begins a turn, and "system"

    def encode(self, prompt: str, *, template: str = PROMPT_TEMPLATE, images: int = 0) -> list[int]:
        """Token ids of the prompt within the template, `images` shown before its text. A text that begins with
        <|im_start|> is its own template, with its own places for images.

        The first places for images hold IMAGE, as many as there are images. No prompt is cut. Raises InvalidRequest
        where there are fewer places than images, and for what is no text, or one that is too long for the model.
        """
        text = whole_text(prompt)
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise InvalidRequest(
                "The prompt has {count} characters, more than the {most} that the model's positions have room "
                "for.\n\nWhat to do: shorten it.",
                code="prompt.21_too_many_characters",
                count=len(text),
                most=MAX_PROMPT_CHARACTERS,
            )
        own = text.startswith("<|im_start|>")
        ids = self._ids(text if own else filled(template, with_places(text, images)))
        places = [i for i, token in enumerate(ids) if token == self._image]
        for i in places[:images]:
            ids[i] = IMAGE
        require_places(ids, images)
        return ids

    def start(self, ids: Sequence[int]) -> int:
        """How many tokens stand before the prompt: those of the system turn, 0 where there is none."""
        if list(ids[:2]) != self._system:
            return 0
        return next((i for i, token in enumerate(ids) if i and token == self._system[0]), 0)

    def require_length(self, prompt: ImagePrompt) -> None:
        """Raise InvalidRequest for a prompt of more positions than the transformer has: one for each token, and for an
        image as many as its longer side has latent tokens, of 16 px each."""
        texts = len(prompt.tokens) - self.start(prompt.tokens) - len(prompt.images)
        positions = texts + sum(max(image.height, image.width) for image in prompt.images)
        if positions >= MAX_POSITIONS:
            raise InvalidRequest(
                "The prompt takes {positions} positions, {tokens} of them for its text; the model has {most}.\n\nWhat "
                "to do: shorten it, or use fewer images.",
                code="prompt.21_too_many_positions",
                positions=positions,
                tokens=texts,
                most=MAX_POSITIONS - 1,
            )

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)
