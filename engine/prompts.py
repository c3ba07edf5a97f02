"""Prompts to token ids: the template, the tokenizer, and which tokens of the embeddings belong to the prompt."""

import logging
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

    def encode(self, prompt: str) -> list[int]:
        """Token ids of the prompt within the template. A text that begins with <|im_start|> is its own template.

        No prompt is cut; a warning says when one is longer than the reference allows.
        """
        text = prompt if prompt.startswith("<|im_start|>") else PROMPT_TEMPLATE.format(prompt)
        ids = list(self._tokenizer(text)["input_ids"])
        length = len(ids) - PROMPT_TEMPLATE_TOKENS
        if length > MAX_PROMPT_TOKENS:
            logger.warning(
                "The prompt has %d tokens, the reference pipeline cuts at %d. It is used whole; the model has seen "
                "few as long.",
                length,
                MAX_PROMPT_TOKENS,
            )
        return ids


def drop_template(hidden_states: Tensor) -> Tensor:
    """(1, length, dim) -> (1, length - 34, dim): without the system part, which the model was trained without."""
    return hidden_states[:, PROMPT_TEMPLATE_TOKENS:]
