"""Prompts to token ids: the template, the tokenizer, and which tokens of the embeddings belong to the prompt."""

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import Qwen2Tokenizer

from .errors import MissingFile
from .families import MAX_PROMPT_TOKENS, PROMPT_TEMPLATE, PROMPT_TEMPLATE_TOKENS

logger = logging.getLogger(__name__)


class PromptTokenizer:
    """Qwen-Image's prompt template around the tokenizer of a pipeline folder, or the one that ComfyUI ships."""

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
            raise MissingFile(f"{folder} holds no tokenizer (tokenizer.json, or vocab.json and merges.txt).")
        self._tokenizer = Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True)
        self._template = self._ids(PROMPT_TEMPLATE.split("{}")[0])
        self._turn = self._ids("<|im_start|>user\n")  # the token that begins a turn, "user", line break

    def encode(self, prompt: str) -> list[int]:
        """Token ids of the prompt within the template. A text that begins with <|im_start|> is its own template.

        No prompt is cut; a warning says when one is longer than the reference allows.
        """
        text = prompt if prompt.startswith("<|im_start|>") else PROMPT_TEMPLATE.format(prompt)
        ids = self._ids(text)
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
        """How many tokens stand before the prompt: 34 in Qwen-Image's template, as the reference cuts it.

        In another template the first two turns' beginning counts, with "user" and the line break after it, as
        ComfyUI's own encoder finds it.
        """
        known = PROMPT_TEMPLATE_TOKENS - 1  # the last one may have joined with the prompt's first characters
        if list(ids[:known]) == self._template[:known]:
            return PROMPT_TEMPLATE_TOKENS
        turns = [i for i, token in enumerate(ids) if token == self._turn[0]][:2]
        begin = turns[-1] if turns else 0
        return begin + 3 if list(ids[begin : begin + 3]) == self._turn and len(ids) > begin + 3 else begin

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])


def drop_template(hidden_states: Tensor, start: int) -> Tensor:
    """(1, length, dim) -> (1, length - start, dim): without the system part, which the model was trained without."""
    return hidden_states[:, start:]
