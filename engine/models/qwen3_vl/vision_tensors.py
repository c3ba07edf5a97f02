"""A Qwen3-VL text encoder's vision part, its tensors by name and its configuration. Reads headers only."""

from dataclasses import replace
from math import isqrt
from typing import Any

from ...errors import WrongModel
from ...files.checkpoint import Checkpoint
from ..qwen_vl.vision_files import VisionKind, VisionTensors, common_config, open_vision, require_width
from ..sorting import shape_of
from .component import TEXT_ENCODER
from .gguf_names import VISION_PROJECTOR, vision_config, vision_names
from .tensors import sort_text_encoder

QWEN3_VISION = VisionKind(
    "Qwen3-VL",
    TEXT_ENCODER.example,
    "mmproj-Qwen3VL-8B-Instruct-F16.gguf",
    VISION_PROJECTOR,
    vision_names,
    vision_config,
)
# of Qwen/Qwen3-VL-8B-Instruct, where a file does not state them; no tensor's shape tells them
_HEAD_DIM, _DEEPSTACK = 72, (8, 16, 24)
_MERGERS = "deepstack_merger_list."


def sort_vision(encoder: Checkpoint) -> VisionTensors:
    """Of a Qwen3-VL text encoder; config: arguments of transformers' Qwen3VLVisionConfig.

    Raises MissingFile where there is none, or several that could be it; WrongModel where it is not whole or belongs
    to another model.
    """
    text_width = sort_text_encoder(encoder).config["hidden_size"]
    vision = open_vision(encoder, QWEN3_VISION)
    vision = replace(vision, config=_vision_config(vision))
    require_width(vision, encoder, text_width)
    return vision


def _vision_config(vision: VisionTensors) -> dict[str, Any]:
    common = common_config(vision, "merger.linear_fc2.weight", "mlp.linear_fc1.weight", _HEAD_DIM)
    positions = shape_of(vision.checkpoint, vision.outside, "pos_embed.weight", 2)[0]
    mergers = {name.split(".")[1] for name in vision.outside if name.startswith(_MERGERS)}
    deepstack = vision.config.get("deepstack_visual_indexes")
    deepstack = list(_DEEPSTACK) if deepstack is None else deepstack
    known = isinstance(deepstack, list | tuple) and all(type(i) is int and 0 <= i < common["depth"] for i in deepstack)
    if not known or len(mergers) != len(deepstack) or isqrt(positions) ** 2 != positions:
        raise WrongModel(
            "{file}: its vision part has {mergers} mergers after the blocks {deepstack!s:.99} of {depth}, and "
            "{positions} positions, which do not fit together. Download it again.",
            code="vision.deepstack_does_not_fit",
            file=vision.checkpoint.path,
            mergers=len(mergers),
            deepstack=deepstack,
            depth=common["depth"],
            positions=positions,
        )
    return {**common, "num_position_embeddings": positions, "deepstack_visual_indexes": list(deepstack)}
