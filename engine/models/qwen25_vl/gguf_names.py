"""A Qwen2.5-VL mmproj's tensors and settings under transformers' names. Renames; reads no file."""

import re
from collections.abc import Mapping
from typing import Any

from ...files.checkpoint import Checkpoint, TensorEntry
from ..qwen_vl.gguf_names import KERNEL, joined, pieces_of, setting, whole_kernel

# general.architecture of Qwen2.5-VL's language model; its text-only sisters have the same tensor names and shapes
# ("pig": gguf-connector's, of whichever model; the tensors tell)
TEXT_ARCHITECTURES = ("qwen2vl", "qwen25vl", "pig")

# the vision part in its own file, the mmproj (MODEL_ARCH.MMPROJ) -> transformers' Qwen2_5_VisionTransformer
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
# the rows of one matrix, which llama.cpp's converter cuts in pieces
_SPLIT_ROWS = ("attn_q", "attn_k", "attn_v")


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
            rows = pieces_of(tensors, *(f"v.blk.{match[1]}.{part}.{kind}" for part in _SPLIT_ROWS))
            shape = (3 * entry.shape[0], *entry.shape[1:]) if entry.shape else ()
            result[f"blocks.{match[1]}.attn.qkv.{kind}"] = joined(rows, shape, entry.nbytes)
        elif name == KERNEL[0]:
            result["patch_embed.proj.weight"] = whole_kernel(tensors)
    return result


def vision_config(mmproj: Checkpoint, depth: int) -> dict[str, Any]:
    """Those of transformers' Qwen2_5_VLVisionConfig settings that an mmproj states, as it states them."""
    pattern = setting(mmproj.metadata, "clip.vision.n_wa_pattern")  # the last of so many blocks sees the whole image
    periodic = isinstance(pattern, int) and pattern > 0
    return {
        "num_heads": setting(mmproj.metadata, "clip.vision.attention.head_count"),
        "window_size": setting(mmproj.metadata, "clip.vision.window_size"),
        "spatial_merge_size": setting(mmproj.metadata, "clip.vision.spatial_merge_size"),
        "fullatt_block_indexes": [i for i in range(depth) if (i + 1) % pattern == 0] if periodic else None,
    }
