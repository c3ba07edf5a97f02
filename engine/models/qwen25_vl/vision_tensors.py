"""Where a text encoder's vision part lies, and its tensors by name: in its own file, or in a GGUF encoder's mmproj.

Reads headers only. Computes nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, MissingFile, WrongModel
from ...files.checkpoint import GGUF_SUFFIX, Checkpoint, TensorEntry, open_checkpoint
from ...files.part_files import stem_of
from ...formats import described_tensors
from ..prefixes import find_prefix, under_prefix
from ..recognition import identify
from ..sorting import shape_of, sort_blocks
from .component import VISION
from .gguf_names import VISION_ARCHITECTURE, VISION_PROJECTOR, vision_config, vision_names
from .tensors import sort_text_encoder

_MARK = "mmproj"
# names by which a vision part is found within its encoder's file
_OWN = (("visual.patch_embed.proj.weight",), ("visual.blocks.0.attn.qkv.weight",))
# of Qwen2.5-VL, where a file does not state them; no tensor's shape tells them
_HEAD_DIM, _WINDOW_PX, _MERGE, _FULL_ATTENTION_EVERY = 80, 112, 2, 8

# words of a file's name that tell its types, not its model
_TYPE = re.compile(r"(b?f|fp)(16|32)|i?q\d+|ud|i1|imat|imatrix")
_AFTER_TYPE = re.compile(r"k|xx?s|s|m|x?l|nl|\d")


@dataclass(frozen=True)
class VisionTensors:
    """A vision part under the names of transformers' Qwen2_5_VisionTransformerPretrainedModel, without prefixes.

    config: arguments of transformers' Qwen2_5_VLVisionConfig. checkpoint: the file that holds the tensors.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    outside: Mapping[str, TensorEntry]
    blocks: tuple[Mapping[str, TensorEntry], ...]


def sort_vision(encoder: Checkpoint) -> VisionTensors:
    """Of a Qwen2.5-VL text encoder: its own, or for a GGUF encoder that of the mmproj in the same folder.

    Raises MissingFile where there is none, or several that could be it; WrongModel where it is not whole or belongs
    to another model.
    """
    text_width = sort_text_encoder(encoder).config["hidden_size"]
    checkpoint, tensors = encoder, _own_tensors(encoder)
    if not tensors and encoder.path.suffix.lower() == GGUF_SUFFIX:
        checkpoint = open_checkpoint(find_mmproj(encoder.path))
        _require_mmproj(checkpoint)
        tensors = vision_names(checkpoint.tensors)
    if not tensors:
        raise WrongModel(
            "{file} holds a language model without its vision part (no tensor is called visual...). Use a whole text "
            "encoder, such as qwen_2.5_vl_7b_fp8_scaled.safetensors.",
            code="vision.missing_in_file",
            file=encoder.path,
        )
    outside, blocks = sort_blocks(checkpoint, tensors, "blocks.")
    own = checkpoint is encoder
    stated = (encoder.config or {}).get("vision_config") if own else vision_config(checkpoint.metadata, len(blocks))
    config = _vision_config(checkpoint, stated, outside, blocks)
    if config["out_hidden_size"] != text_width:
        raise WrongModel(
            "{file} makes {makes} numbers of each part of an image, the text encoder {text_encoder} takes {takes}: "
            "models of different sizes. Use the vision part of the same one.",
            code="vision.other_size",
            file=checkpoint.path,
            makes=config["out_hidden_size"],
            text_encoder=encoder.path.name,
            takes=text_width,
        )
    return VisionTensors(checkpoint, config, outside, blocks)


def mmproj_identity(encoder: Checkpoint) -> str:
    """Of the file that would be read beside a GGUF encoder; empty where none would be, or none can be chosen."""
    if encoder.path.suffix.lower() != GGUF_SUFFIX or _own_tensors(encoder):
        return ""
    try:
        return open_checkpoint(find_mmproj(encoder.path)).identity
    except CheckpointError:
        return ""  # said where an image is shown; prompts of text alone need none


def find_mmproj(encoder: Path) -> Path:
    """The GGUF file beside `encoder` with mmproj and the model's name in its name; else the one with mmproj and no
    model's name; else the only one. Types (Q4_K_M, F16) do not count.

    Raises MissingFile where there is none, or several.
    """
    try:
        listed = sorted(encoder.parent.iterdir())
    except OSError as error:
        raise MissingFile(
            "{file} cannot be read ({error}). Check that this user may read it.",
            code="file.unreadable",
            file=encoder.parent,
            error=error,
        ) from error
    found = [file for file in listed if file.suffix.lower() == GGUF_SUFFIX and _MARK in file.stem.lower()]
    same = [file for file in found if _model_words(file) == _model_words(encoder)]
    nameless = [file for file in found if not _model_words(file)]
    fitting = same or nameless or found
    if not fitting:
        raise MissingFile(
            "{file} holds the language model only; its vision part, which sees images, is not beside it. Put the "
            "mmproj file of the same model (such as Qwen2.5-VL-7B-Instruct-mmproj-F16.gguf) into {folder}, or use a "
            ".safetensors text encoder, which holds both.",
            code="vision.missing_beside",
            file=encoder,
            folder=encoder.parent,
        )
    if len(fitting) > 1:
        names = ", ".join(file.name for file in fitting)
        raise MissingFile(
            "{file}: {count} files beside it could be its vision part ({names}). Keep one of them there, with the "
            "name of the encoder.",
            code="vision.several_beside",
            file=encoder,
            count=len(fitting),
            names=names,
        )
    return fitting[0]


def _model_words(file: Path) -> list[str]:
    words: list[str] = []
    after_type = False
    for word in re.split(r"[-_. ]+", stem_of(file).lower()):
        after_type = _TYPE.fullmatch(word) is not None or (after_type and _AFTER_TYPE.fullmatch(word) is not None)
        if word and word != _MARK and not after_type:
            words.append(word)
    return words


def _own_tensors(encoder: Checkpoint) -> dict[str, TensorEntry]:
    described = described_tensors(encoder)
    prefix = find_prefix(described, _OWN)
    return {} if prefix is None else under_prefix(described, f"{prefix}visual.")


def _require_mmproj(checkpoint: Checkpoint) -> None:
    metadata = checkpoint.metadata
    architecture = metadata.get("general.architecture", VISION_ARCHITECTURE)
    projector = metadata.get("clip.vision.projector_type") or metadata.get("clip.projector_type", VISION_PROJECTOR)
    found = identify(checkpoint.tensors)
    if (found, architecture, projector) != (VISION, VISION_ARCHITECTURE, VISION_PROJECTOR):
        raise WrongModel(
            "{file} is {found} (architecture {architecture!r:.99}, projector {projector!r:.99}); the vision part of "
            "Qwen2.5-VL ({wanted_architecture!r}, {wanted_projector!r}) is needed beside the text encoder. Put it "
            "there, and this file elsewhere.",
            code="vision.other_kind",
            file=checkpoint.path,
            found=found.value,
            architecture=architecture,
            projector=projector,
            wanted_architecture=VISION_ARCHITECTURE,
            wanted_projector=VISION_PROJECTOR,
        )


def _vision_config(
    checkpoint: Checkpoint,
    given: Any,
    outside: Mapping[str, TensorEntry],
    blocks: tuple[Mapping[str, TensorEntry], ...],
) -> dict[str, Any]:
    stated = given if isinstance(given, dict) else {}

    def number(key: str, default: int) -> int:
        value = stated.get(key)
        if value is not None and not (type(value) is int and 0 < value < 2**31):
            raise WrongModel(
                "{file}: {key} of its vision part is {value!r:.99}. Download it again.",
                code="vision.wrong_setting",
                file=checkpoint.path,
                key=key,
                value=value,
            )
        return default if value is None else value

    hidden, channels, frames, patch, patch_width = shape_of(checkpoint, outside, "patch_embed.proj.weight", 5)
    out, merged = shape_of(checkpoint, outside, "merger.mlp.2.weight", 2)
    heads, merge = number("num_heads", max(1, hidden // _HEAD_DIM)), number("spatial_merge_size", _MERGE)
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
    full = stated.get("fullatt_block_indexes")
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
        "window_size": number("window_size", _WINDOW_PX),
        "out_hidden_size": out,
        "fullatt_block_indexes": full,
    }
