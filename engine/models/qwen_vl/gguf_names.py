"""A GGUF text encoder's tensors and settings under transformers' names, and what mmprojs share. Reads no file."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import WrongModel
from ...files.checkpoint import TensorEntry
from ...files.safetensors_header import BITS_PER_ELEMENT

# llama.cpp (gguf-py/gguf/tensor_mapping.py, MODEL_ARCH.QWEN2VL and QWEN3VL) -> transformers' text models
_OUTSIDE = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# the two time slices that llama.cpp's converter cuts a 3D kernel into
KERNEL = ("v.patch_embd.weight", "v.patch_embd.weight.1")


def text_encoder_names(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The language model's tensors renamed; what it does not use (the output head, rotary factors) is left out."""
    return {new: entry for name, entry in tensors.items() if (new := _new_name(name)) is not None}


def text_encoder_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Those settings of transformers' text configuration that a GGUF file states, as it states them."""
    own = metadata.get("general.architecture", "")
    sections = setting(metadata, f"{own}.rope.dimension_sections")  # time, height, width, and a zero
    return {
        "num_attention_heads": setting(metadata, f"{own}.attention.head_count"),
        "rms_norm_eps": setting(metadata, f"{own}.attention.layer_norm_rms_epsilon"),
        "rope_theta": setting(metadata, f"{own}.rope.freq_base"),
        "rope_parameters": {"mrope_section": sections[:3]} if isinstance(sections, list) else None,
    }


def whole_kernel(tensors: Mapping[str, TensorEntry]) -> TensorEntry:
    """An mmproj's kernel of patches, (out, channels, frames, height, width), as one entry again.

    Raises WrongModel for slices that do not fit together.
    """
    slices = pieces_of(tensors, *KERNEL)
    entry = slices[0]
    element_bits = BITS_PER_ELEMENT.get(entry.dtype)
    if len(entry.shape) != 4 or element_bits is None:
        raise WrongModel(
            "{file}: {name!r} is not a kernel for patches, but {dtype}{shape}.",
            code="text_encoder.no_kernel",
            file=entry.file,
            name=KERNEL[0],
            dtype=entry.dtype,
            shape=list(entry.shape),
        )
    out, channels, height, width = entry.shape
    return joined(slices, (out, channels, len(slices), height, width), height * width * element_bits // 8)


def pieces_of(tensors: Mapping[str, TensorEntry], *names: str) -> tuple[TensorEntry, ...]:
    first = tensors[names[0]]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise WrongModel(
            "{file} lacks {name!r}: the vision part is incomplete. Download it again.",
            code="vision.not_whole",
            file=first.file,
            name=missing[0],
        )
    pieces = tuple(tensors[name] for name in names)
    for name, piece in zip(names, pieces, strict=True):
        if (piece.dtype, piece.shape) != (first.dtype, first.shape):
            raise WrongModel(
                "{file}: {name!r} is {dtype}{shape} and {other!r} {other_dtype}{other_shape}; together they form one "
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


def joined(pieces: tuple[TensorEntry, ...], shape: tuple[int, ...], run_bytes: int) -> TensorEntry:
    nbytes = sum(piece.nbytes for piece in pieces)
    return replace(pieces[0], shape=shape, nbytes=nbytes, parts=pieces, run_bytes=run_bytes)


def setting(metadata: Mapping[str, str], key: str) -> Any:
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
