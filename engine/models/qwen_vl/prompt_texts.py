"""What a prompt and a tokenizer have to be, whichever template they are for. Cuts nothing into tokens, but a probe."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InvalidRequest, WrongModel
from ...texts import half_character, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Small models have tokenizers of their own; one of at least so many tokens makes of this text Qwen2.5's, or is another
# model's. Each part is split, normalized or merged otherwise by some.
FULL_VOCABULARY = 100_000
PROBE = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    "Picture 1: it'Somewhere 2024 e\u0301 \u212b  two\n\n\tlines "
    "Grüße, photorealistic 把圆形变成红色 Здравствуйте こんにちは مرحبا 안녕하세요 🐈 unbelievableness<|im_end|>\n"
)
PROBE_DIGEST = "8be9e9ba9a7ac9a1"  # of the ids in decimal, with commas


def whole_text(prompt: object) -> str:
    """The prompt. Raises InvalidRequest for what is no text of whole characters."""
    if not isinstance(prompt, str):
        raise InvalidRequest(
            "The prompt is {prompt}; text is needed.\n\nWhat to do: check what is connected.",
            code="prompt.no_text",
            prompt=shown(prompt),
        )
    half = half_character(prompt)
    if half is not None:
        raise InvalidRequest(
            "The prompt's character {position} is one half of a character ({character!a}), which cannot be "
            "encoded.\n\nWhat to do: type it again, or remove it.",
            code="prompt.half_character",
            position=half + 1,
            character=prompt[half],
        )
    return prompt


def filled(template: str, prompt: str) -> str:
    """The template with the prompt in its place. Raises InvalidRequest where it has none."""
    try:
        return template.format(prompt)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise InvalidRequest(
            "The template of the prompt cannot be filled in ({error}).\n\nWhat to do: mark the prompt's place in it "
            "with {{}}, and double any other braces.",
            code="prompt.template_not_filled",
            error=error,
        ) from error


def require_known(folder: Path, tokenizer: "Tokenizer") -> None:
    """Raise WrongModel for a whole tokenizer that makes other tokens than Qwen's of a probe."""
    ids = ",".join(map(str, tokenizer.encode(PROBE).ids))
    full = tokenizer.get_vocab_size(with_added_tokens=False) >= FULL_VOCABULARY
    if full and hashlib.sha256(ids.encode()).hexdigest()[:16] != PROBE_DIGEST:
        raise WrongModel(
            "{folder} holds another model's tokenizer: from the same text, it makes other tokens than Qwen2.5's does. "
            "Use the tokenizer folder of Qwen-Image, or a text encoder from models/text_encoders.",
            code="tokenizer.other_tokens",
            folder=folder,
        )
