"""A Qwen3-VL mmproj's tensors and settings under transformers' names. Renames; reads no file."""

import re
from collections.abc import Mapping
from typing import Any

from ...files.checkpoint import Checkpoint, TensorEntry
from ..qwen_vl.gguf_names import KERNEL, setting, whole_kernel

VISION_PROJECTOR = "qwen3vl_merger"
# llama.cpp (gguf-py/gguf/tensor_mapping.py, MODEL_ARCH.MMPROJ; Qwen3VLVisionModel of its converter) -> transformers
_OUTSIDE = {
    "v.patch_embd": "patch_embed.proj",
    "v.position_embd": "pos_embed",
    "v.post_ln": "merger.norm",
    "mm.0": "merger.linear_fc1",
    "mm.2": "merger.linear_fc2",
}
_IN_BLOCK = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
    "ffn_up": "mlp.linear_fc1",
    "ffn_down": "mlp.linear_fc2",
}
_IN_DEEPSTACK = {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}
_DEEPSTACK = re.compile(r"v\.deepstack\.(\d+)\.(\w+)")


def vision_names(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """An mmproj's tensors renamed, its kernel of patches as one entry again. Mergers of the deepstack, which are
    numbered by their blocks there, are numbered from 0. Raises WrongModel for slices that do not fit together."""
    order = {block: i for i, block in enumerate(_deepstack_blocks(tensors))}
    result: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        layer, _, kind = name.rpartition(".")
        block, merger = re.fullmatch(r"v\.blk\.(\d+)\.(\w+)", layer), _DEEPSTACK.fullmatch(layer)
        if name == KERNEL[0]:
            result["patch_embed.proj.weight"] = whole_kernel(tensors)
        elif layer in _OUTSIDE:
            result[f"{_OUTSIDE[layer]}.{kind}"] = entry
        elif block and block[2] in _IN_BLOCK:
            result[f"blocks.{block[1]}.{_IN_BLOCK[block[2]]}.{kind}"] = entry
        elif merger and merger[2] in _IN_DEEPSTACK:
            result[f"deepstack_merger_list.{order[int(merger[1])]}.{_IN_DEEPSTACK[merger[2]]}.{kind}"] = entry
    return result


def vision_config(mmproj: Checkpoint, depth: int) -> dict[str, Any]:
    """Those of transformers' Qwen3VLVisionConfig settings that an mmproj states, as it states them, and the blocks
    behind which its deepstack branches off."""
    return {
        "num_heads": setting(mmproj.metadata, "clip.vision.attention.head_count"),
        "spatial_merge_size": setting(mmproj.metadata, "clip.vision.spatial_merge_size"),
        "deepstack_visual_indexes": _deepstack_blocks(mmproj.tensors),
    }


def _deepstack_blocks(tensors: Mapping[str, TensorEntry]) -> list[int]:
    found = (_DEEPSTACK.fullmatch(name.rpartition(".")[0]) for name in tensors)
    return sorted({int(match[1]) for match in found if match})
