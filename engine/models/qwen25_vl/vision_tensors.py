"""A Qwen2.5-VL text encoder's vision part, its tensors by name and its configuration. Reads headers only."""

from dataclasses import replace
from typing import Any

from ...errors import WrongModel
from ...files.checkpoint import Checkpoint
from ..qwen_vl.vision_files import VisionKind, VisionTensors, common_config, open_vision, require_width, stated_number
from .component import TEXT_ENCODER
from .gguf_names import VISION_PROJECTOR, vision_config, vision_names
from .tensors import sort_text_encoder

QWEN25_VISION = VisionKind(
    "Qwen2.5-VL",
    TEXT_ENCODER.example,
    "Qwen2.5-VL-7B-Instruct-mmproj-F16.gguf",
    VISION_PROJECTOR,
    vision_names,
    vision_config,
)
# where a file does not state them; no tensor's shape tells them
_HEAD_DIM, _WINDOW_PX, _FULL_ATTENTION_EVERY = 80, 112, 8


def sort_vision(encoder: Checkpoint) -> VisionTensors:
    """Of a Qwen2.5-VL text encoder; config: arguments of transformers' Qwen2_5_VLVisionConfig.

    Raises MissingFile where there is none, or several that could be it; WrongModel where it is not whole or belongs
    to another model.
    """
    text_width = sort_text_encoder(encoder).config["hidden_size"]
    vision = open_vision(encoder, QWEN25_VISION)
    vision = replace(vision, config=_vision_config(vision))
    require_width(vision, encoder, text_width)
    return vision


def _vision_config(vision: VisionTensors) -> dict[str, Any]:
    common = common_config(vision, "merger.mlp.2.weight", "mlp.gate_proj.weight", _HEAD_DIM)
    blocks = vision.blocks
    full = vision.config.get("fullatt_block_indexes")
    if full is None:
        full = [i for i in range(len(blocks)) if (i + 1) % _FULL_ATTENTION_EVERY == 0]
    if not isinstance(full, list) or not all(type(i) is int and 0 <= i < len(blocks) for i in full):
        raise WrongModel(
            "{file}: blocks {full!s:.99} are said to see the whole image, which is not possible with {block_count} "
            "blocks.",
            code="vision.wrong_blocks",
            file=vision.checkpoint.path,
            full=full,
            block_count=len(blocks),
        )
    window = stated_number(vision, "window_size", _WINDOW_PX)
    return {**common, "window_size": window, "fullatt_block_indexes": full}
