"""A GGUF text encoder's tensors and settings, and its mmproj's, under transformers' names. Renames; reads no file."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import WrongModel
from ...files.checkpoint import TensorEntry
from ...files.safetensors_header import BITS_PER_ELEMENT

# general.architecture of Qwen2.5-VL's language model; its text-only sisters have the same tensor names and shapes
# ("pig": gguf-connector's, of whichever model; the tensors tell)
TEXT_ARCHITECTURES = ("qwen2vl", "qwen25vl", "pig")

# llama.cpp (gguf-py/gguf/tensor_mapping.py, MODEL_ARCH.QWEN2VL) -> transformers' Qwen2_5_VLTextModel
_OUTSIDE = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# the vision part in its own file, the mmproj (MODEL_ARCH.MMPROJ) -> transformers' Qwen2_5_VisionTransformer
VISION_ARCHITECTURE = "clip"
VISION_PROJECTOR = "qwen2.5vl_merger"
_VISION_OUTSIDE = {"v.post_ln": "merger.ln_q", "mm.0": "merger.mlp.0", "mm.2": "merger.mlp.2"}
_IN_VISION_BLOCK = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# what llama.cpp's converter cuts in pieces: the rows of one matrix, and the two time slices of a 3D kernel
_SPLIT_ROWS = ("attn_q", "attn_k", "attn_v")
_SPLIT_KERNEL = ("v.patch_embd.weight", "v.patch_embd.weight.1")


def text_encoder_names(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The language model's tensors renamed; what it does not use (the output head, rotary factors) is left out."""
    return {new: entry for name, entry in tensors.items() if (new := _new_name(name)) is not None}


def text_encoder_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Those of transformers' Qwen2_5_VLTextConfig settings that a GGUF file states, as it states them."""
    own = metadata.get("general.architecture", "")
    sections = _setting(metadata, f"{own}.rope.dimension_sections")  # time, height, width, and a zero
    return {
        "num_attention_heads": _setting(metadata, f"{own}.attention.head_count"),
        "rms_norm_eps": _setting(metadata, f"{own}.attention.layer_norm_rms_epsilon"),
        "rope_theta": _setting(metadata, f"{own}.rope.freq_base"),
        "rope_parameters": {"mrope_section": sections[:3]} if isinstance(sections, list) else None,
    }


def vision_names(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """An mmproj's tensors renamed, what the converter cut in pieces as one entry again.

    Raises WrongModel for pieces that do not fit together.
    """
    result: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        layer, _, kind = name.rpartition(".")
        match = re.fullmatch(r"v\.blk\.(\d+)\.(\w+)", layer)
        if layer in _VISION_OUTSIDE:
            result[f"{_VISION_OUTSIDE[layer]}.{kind}"] = entry
        elif match and match[2] in _IN_VISION_BLOCK:
            result[f"blocks.{match[1]}.{_IN_VISION_BLOCK[match[2]]}.{kind}"] = entry
        elif match and match[2] == _SPLIT_ROWS[0]:
            rows = _pieces(tensors, *(f"v.blk.{match[1]}.{part}.{kind}" for part in _SPLIT_ROWS))
            shape = (3 * entry.shape[0], *entry.shape[1:]) if entry.shape else ()
            result[f"blocks.{match[1]}.attn.qkv.{kind}"] = _joined(rows, shape, entry.nbytes)
        elif name == _SPLIT_KERNEL[0]:
            slices = _pieces(tensors, *_SPLIT_KERNEL)
            element_bits = BITS_PER_ELEMENT.get(entry.dtype)
            if len(entry.shape) != 4 or element_bits is None:
                raise WrongModel(
                    "{file}: {name!r} is no kernel, but {dtype}{shape}.",
                    code="text_encoder.no_kernel",
                    file=entry.file,
                    name=name,
                    dtype=entry.dtype,
                    shape=list(entry.shape),
                )
            out, channels, height, width = entry.shape
            shape = (out, channels, len(slices), height, width)
            result["patch_embed.proj.weight"] = _joined(slices, shape, height * width * element_bits // 8)
    return result


def vision_config(metadata: Mapping[str, str], depth: int) -> dict[str, Any]:
    """Those of transformers' Qwen2_5_VLVisionConfig settings that an mmproj states, as it states them."""
    pattern = _setting(metadata, "clip.vision.n_wa_pattern")  # the last of so many blocks sees the whole image
    periodic = isinstance(pattern, int) and pattern > 0
    return {
        "num_heads": _setting(metadata, "clip.vision.attention.head_count"),
        "window_size": _setting(metadata, "clip.vision.window_size"),
        "spatial_merge_size": _setting(metadata, "clip.vision.spatial_merge_size"),
        "fullatt_block_indexes": [i for i in range(depth) if (i + 1) % pattern == 0] if periodic else None,
    }


def _pieces(tensors: Mapping[str, TensorEntry], *names: str) -> tuple[TensorEntry, ...]:
    first = tensors[names[0]]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise WrongModel(
            "{file} lacks {name!r}: the vision part is not whole. Download it again.",
            code="vision.not_whole",
            file=first.file,
            name=missing[0],
        )
    pieces = tuple(tensors[name] for name in names)
    for name, piece in zip(names, pieces, strict=True):
        if (piece.dtype, piece.shape) != (first.dtype, first.shape):
            raise WrongModel(
                "{file}: {name!r} is {dtype}{shape} and {other!r} {other_dtype}{other_shape}; they belong in one "
                "tensor. Use a vision part of one type, such as F16.",
                code="vision.mixed_types",
                file=first.file,
                name=name,
                dtype=piece.dtype,
                shape=list(piece.shape),
                other=names[0],
                other_dtype=first.dtype,
                other_shape=list(first.shape),
            )
    return pieces


def _joined(pieces: tuple[TensorEntry, ...], shape: tuple[int, ...], run_bytes: int) -> TensorEntry:
    nbytes = sum(piece.nbytes for piece in pieces)
    return replace(pieces[0], shape=shape, nbytes=nbytes, parts=pieces, run_bytes=run_bytes)


def _setting(metadata: Mapping[str, str], key: str) -> Any:
    """A number, a truth, or a list of such; a text where none of these stands there; None where nothing does."""
    text = metadata.get(key, "null")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    flat = value if isinstance(value, list) else [value]
    return text if any(isinstance(item, list | dict) for item in flat) else value


def _new_name(name: str) -> str | None:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None:
        return _OUTSIDE.get(name)
    index, part, kind = match.groups()
    return f"layers.{index}.{_IN_LAYER[part]}.{kind}" if part in _IN_LAYER else None
