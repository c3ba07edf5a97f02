"""The node that encodes the positive and the negative prompt in one visit of the text encoder."""

from typing import Any

from .adapters.clip import LowVRAMCLIP
from .adapters.value_checks import check_widgets
from .display_names import CATEGORY
from .live_plan import refuse_what_cannot_run


class QwenLowVRAMEncodePrompts:
    """Encode Prompts."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Encodes both prompts together, so each layer of the text encoder passes through the card only once."
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    OUTPUT_TOOLTIPS = ("What the image should show.", "What the image should not show; used only if cfg is above 1.")
    SEARCH_ALIASES = ("prompt", "text encode", "clip text encode", "qwen")
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = {"multiline": True, "dynamicPrompts": True}
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "The text encoder: this pack's, or ComfyUI's own."}),
                "positive": (
                    "STRING",
                    {
                        **text,
                        "default": "",
                        "tooltip": "What the image should show. Put text that should appear in it in quotes.",
                    },
                ),
                "negative": (
                    "STRING",
                    {
                        **text,
                        "default": " ",
                        "tooltip": "What the image should not show. The model's own default is a single space.",
                    },
                ),
            },
            "hidden": {"prompt": "PROMPT"},
        }

    def encode(self, clip: Any, positive: str, negative: str, prompt: Any = None) -> tuple[Any, Any]:
        check_widgets(self.INPUT_TYPES(), clip=clip, positive=positive, negative=negative)
        refuse_what_cannot_run(prompt)
        if isinstance(clip, LowVRAMCLIP):
            return tuple(clip.encode_prompts([positive, negative]))
        return tuple(clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (positive, negative))
