"""Where a text encoder's vision part lies: in its own file, or in a GGUF encoder's mmproj. Reads headers only."""

import re
from collections.abc import Callable, Mapping
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

_ARCHITECTURE = "clip"
_MARK = "mmproj"
MERGE = 2  # patches of one token along each side, in every Qwen-VL so far
# names by which a vision part is found within its encoder's file
_OWN = (("visual.patch_embed.proj.weight",), ("visual.blocks.0.attn.qkv.weight",))

# words of a file's name that tell its types, not its model
_TYPE = re.compile(r"(b?f|fp)(16|32)|i?q\d+|ud|i1|imat|imatrix")
_AFTER_TYPE = re.compile(r"k|xx?s|s|m|x?l|nl|\d")


@dataclass(frozen=True)
class VisionKind:
    """How one model's vision part is told, and renamed: `model` names it in messages, `example` and `example_mmproj`
    are published files. projector: of its mmproj. names: an mmproj's tensors under transformers' names; config: the
    settings that an mmproj of so many blocks states."""

    model: str
    example: str
    example_mmproj: str
    projector: str
    names: Callable[[Mapping[str, TensorEntry]], Mapping[str, TensorEntry]]
    config: Callable[[Checkpoint, int], dict[str, Any]]


@dataclass(frozen=True)
class VisionTensors:
    """A vision part under the names of transformers' module, without prefixes.

    config: arguments of transformers' configuration of it. checkpoint: the file that holds the tensors.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    outside: Mapping[str, TensorEntry]
    blocks: tuple[Mapping[str, TensorEntry], ...]


def open_vision(encoder: Checkpoint, kind: VisionKind) -> VisionTensors:
    """The encoder's own, or for a GGUF encoder that of the mmproj in the same folder; `config` as it is stated.

    Raises MissingFile where there is none, or several that could be it; WrongModel where it is another model's.
    """
    checkpoint, tensors = encoder, own_tensors(encoder)
    if not tensors and encoder.path.suffix.lower() == GGUF_SUFFIX:
        checkpoint = open_checkpoint(find_mmproj(encoder.path, kind.example_mmproj, kind.projector))
        _require_mmproj(checkpoint, kind)
        tensors = dict(kind.names(checkpoint.tensors))
    if not tensors:
        raise WrongModel(
            "{file} holds a language model without its vision part (no tensor is called visual...). Use a whole text "
            "encoder, such as {example}.",
            code="vision.missing_in_file",
            file=encoder.path,
            example=kind.example,
        )
    outside, blocks = sort_blocks(checkpoint, tensors, "blocks.")
    own = checkpoint is encoder
    stated = (encoder.config or {}).get("vision_config") if own else kind.config(checkpoint, len(blocks))
    return VisionTensors(checkpoint, stated if isinstance(stated, dict) else {}, outside, blocks)


def stated_number(vision: VisionTensors, key: str, default: int) -> int:
    """Raises WrongModel where the file states what is none."""
    value = vision.config.get(key)
    if value is not None and not (type(value) is int and 0 < value < 2**31):
        raise WrongModel(
            "{file}: {key} of its vision part is {value!r:.99}. Download it again.",
            code="vision.wrong_setting",
            file=vision.checkpoint.path,
            key=key,
            value=value,
        )
    return default if value is None else value


def common_config(vision: VisionTensors, last: str, first: str, head_dim: int) -> dict[str, Any]:
    """Arguments that transformers' configurations of all vision parts have. last: of the mergers' matrices; first: of a
    block's MLP's. head_dim: where the file states no heads. Raises WrongModel for tensors that do not fit together."""
    checkpoint, outside, blocks = vision.checkpoint, vision.outside, vision.blocks
    hidden, channels, frames, patch, patch_width = shape_of(checkpoint, outside, "patch_embed.proj.weight", 5)
    out, merged = shape_of(checkpoint, outside, last, 2)
    heads = stated_number(vision, "num_heads", max(1, hidden // head_dim))
    merge = stated_number(vision, "spatial_merge_size", MERGE)
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
    return {
        "depth": len(blocks),
        "hidden_size": hidden,
        "intermediate_size": shape_of(checkpoint, blocks[0] if blocks else {}, first, 2)[0],
        "num_heads": heads,
        "in_channels": channels,
        "patch_size": patch,
        "spatial_merge_size": merge,
        "temporal_patch_size": frames,
        "out_hidden_size": out,
    }


def require_width(vision: VisionTensors, encoder: Checkpoint, text_width: int) -> None:
    """Raise WrongModel where the vision part makes embeddings of another size than the language model takes."""
    makes = vision.config["out_hidden_size"]
    if makes != text_width:
        raise WrongModel(
            "{file} makes {makes} numbers for each part of an image, but the text encoder {text_encoder} takes "
            "{takes}: they are models of different sizes. Use the vision part of the same model.",
            code="vision.other_size",
            file=vision.checkpoint.path,
            makes=makes,
            text_encoder=encoder.path.name,
            takes=text_width,
        )


def mmproj_identity(encoder: Checkpoint) -> str:
    """Of the files beside a GGUF encoder that its vision part is chosen from; empty where there are none."""
    if encoder.path.suffix.lower() != GGUF_SUFFIX or own_tensors(encoder):
        return ""
    try:
        return ", ".join(mmproj.identity for mmproj in map(_opened, _mmprojs(encoder.path)) if mmproj)
    except CheckpointError:
        return ""  # said where an image is shown; prompts of text alone need none


def find_mmproj(encoder: Path, example: str, projector: str = "") -> Path:
    """The GGUF file beside `encoder` with mmproj and the model's name in its name; else the one with mmproj and no
    model's name; else the only one. Types (Q4_K_M, F16) do not count, nor, among several files, those that state
    another `projector`. `example`: for messages.

    Raises MissingFile where there is none, or several.
    """
    found = _mmprojs(encoder)
    if projector and len(found) > 1:
        found = [file for file in found if _projector(_opened(file), projector) == projector]
    same = [file for file in found if _model_words(file) == _model_words(encoder)]
    nameless = [file for file in found if not _model_words(file)]
    fitting = same or nameless or found
    if not fitting:
        raise MissingFile(
            "{file} holds only the language model; its vision part, which sees images, is not beside it. Put the "
            "mmproj file of the same model (such as {example}) into {folder}, or use a .safetensors text encoder, "
            "which holds both.",
            code="vision.missing_beside",
            file=encoder,
            example=example,
            folder=encoder.parent,
        )
    if len(fitting) > 1:
        names = ", ".join(file.name for file in fitting)
        raise MissingFile(
            "{file}: {count} files beside it could be its vision part ({names}). Keep only one of them there, named "
            "like the encoder.",
            code="vision.several_beside",
            file=encoder,
            count=len(fitting),
            names=names,
        )
    return fitting[0]


def _mmprojs(encoder: Path) -> list[Path]:
    try:
        listed = sorted(encoder.parent.iterdir())
    except OSError as error:
        raise MissingFile(
            "{file} cannot be read ({error}). Check that your user account may read it.",
            code="file.unreadable",
            file=encoder.parent,
            error=error,
        ) from error
    return [file for file in listed if file.suffix.lower() == GGUF_SUFFIX and _MARK in file.stem.lower()]


def _opened(mmproj: Path) -> Checkpoint | None:
    """None where it cannot be read, which is said when it is chosen."""
    try:
        return open_checkpoint(mmproj)
    except CheckpointError:
        return None


def _projector(mmproj: Checkpoint | None, default: str) -> str:
    metadata = mmproj.metadata if mmproj else {}
    return metadata.get("clip.vision.projector_type") or metadata.get("clip.projector_type", default)


def _model_words(file: Path) -> list[str]:
    words: list[str] = []
    after_type = False
    for word in re.split(r"[-_. ]+", stem_of(file).lower()):
        after_type = _TYPE.fullmatch(word) is not None or (after_type and _AFTER_TYPE.fullmatch(word) is not None)
        if word and word != _MARK and not after_type:
            words.append(word)
    return words


def own_tensors(encoder: Checkpoint) -> dict[str, TensorEntry]:
    described = described_tensors(encoder)
    prefix = find_prefix(described, _OWN)
    return {} if prefix is None else under_prefix(described, f"{prefix}visual.")


def _require_mmproj(checkpoint: Checkpoint, kind: VisionKind) -> None:
    metadata = checkpoint.metadata
    architecture = metadata.get("general.architecture", _ARCHITECTURE)
    projector = _projector(checkpoint, kind.projector)
    found = identify(checkpoint.tensors)
    if (found, architecture, projector) != (VISION, _ARCHITECTURE, kind.projector):
        raise WrongModel(
            "{file} is {found} (architecture {architecture!r:.99}, projector {projector!r:.99}); the vision part of "
            "{model} ({wanted_architecture!r}, {wanted_projector!r}) is needed beside the text encoder. Put that one "
            "there, and move this file elsewhere.",
            code="vision.other_kind",
            file=checkpoint.path,
            found=found.value,
            model=kind.model,
            architecture=architecture,
            projector=projector,
            wanted_architecture=_ARCHITECTURE,
            wanted_projector=kind.projector,
        )
