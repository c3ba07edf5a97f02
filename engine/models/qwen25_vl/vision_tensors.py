"""A Qwen2.5-VL text encoder's vision part, its tensors by name and its configuration. Reads headers only."""

from dataclasses import replace
from typing import Any

from ...errors import WrongModel
from ...files.checkpoint import Checkpoint
from ..qwen_vl.vision_files import VisionKind, VisionTensors, open_vision, require_width, stated_number
from ..sorting import shape_of
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
_HEAD_DIM, _WINDOW_PX, _MERGE, _FULL_ATTENTION_EVERY = 80, 112, 2, 8


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
    checkpoint, outside, blocks = vision.checkpoint, vision.outside, vision.blocks
    hidden, channels, frames, patch, patch_width = shape_of(checkpoint, outside, "patch_embed.proj.weight", 5)
    out, merged = shape_of(checkpoint, outside, "merger.mlp.2.weight", 2)
    heads, merge = (
        stated_number(vision, "num_heads", max(1, hidden // _HEAD_DIM)),
        stated_number(vision, "spatial_merge_size", _MERGE),
    )
    if patch != patch_width or hidden % heads or merged != hidden * merge**2:
        raise WrongModel(
            "{file}: {hidden} dimensions in {heads} heads, patches of {patch}x{patch_width} and {merged} numbers of "
            "{merge}x{merge} patches do not fit together. Download it again.",
            code="vision.does_not_fit_together",
            file=checkpoint.path,
            hidden=hidden,
            heads=heads,
            patch=patch,
            patch_width=patch_width,
            merged=merged,
            merge=merge,
        )
    full = vision.config.get("fullatt_block_indexes")
    if full is None:
        full = [i for i in range(len(blocks)) if (i + 1) % _FULL_ATTENTION_EVERY == 0]
    if not isinstance(full, list) or not all(type(i) is int and 0 <= i < len(blocks) for i in full):
        raise WrongModel(
            "{file}: blocks {full!s:.99} of {block_count} cannot see the whole image.",
            code="vision.wrong_blocks",
            file=checkpoint.path,
            full=full,
            block_count=len(blocks),
        )
    return {
        "depth": len(blocks),
        "hidden_size": hidden,
        "intermediate_size": shape_of(checkpoint, blocks[0] if blocks else {}, "mlp.gate_proj.weight", 2)[0],
        "num_heads": heads,
        "in_channels": channels,
        "patch_size": patch,
        "spatial_merge_size": merge,
        "temporal_patch_size": frames,
        "window_size": stated_number(vision, "window_size", _WINDOW_PX),
        "out_hidden_size": out,
        "fullatt_block_indexes": full,
    }
