"""Let ComfyUI's own loaders open small Qwen-Image files: they take heads and widths for granted.

In a test's process, or in a real server through a custom node.
"""

from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_detection

_NODE = """import nodes
from native_sizes import teach, teach_patches

teach()
teach_patches(nodes.NODE_CLASS_MAPPINGS["ModelPatchLoader"], layers=4, width=64)
NODE_CLASS_MAPPINGS = {}
"""
_ROPE_AXES = {32: [4, 14, 14], 64: [8, 28, 28], 128: [16, 56, 56]}


def teach() -> None:
    """From now on, in this process."""
    detect = comfy.model_detection.detect_unet_config

    def detect_with_sizes(state_dict: Any, key_prefix: str, *args: Any, **kwargs: Any) -> Any:
        config = detect(state_dict, key_prefix, *args, **kwargs)
        if config is not None and config.get("image_model") == "qwen_image":
            head_dim = state_dict[f"{key_prefix}transformer_blocks.0.attn.norm_q.weight"].shape[0]
            config["attention_head_dim"] = head_dim
            config["num_attention_heads"] = state_dict[f"{key_prefix}img_in.weight"].shape[0] // head_dim
            config["joint_attention_dim"] = state_dict[f"{key_prefix}txt_norm.weight"].shape[0]
            config["axes_dims_rope"] = _ROPE_AXES[head_dim]
        return config

    comfy.model_detection.detect_unet_config = detect_with_sizes


def teach_patches(loader: type, *, layers: int, width: int) -> None:
    """Let ComfyUI's ModelPatchLoader open DiffSynth patches of this size. Its class is the one that a graph runs."""
    names = loader.load_model_patch.__globals__  # type: ignore[attr-defined]
    names["QwenImageBlockWiseControlNet"] = partial(names["QwenImageBlockWiseControlNet"], num_layers=layers, dim=width)


def custom_node() -> str:
    """The text of a custom node, one file, that teaches the server which loads it."""
    folder = str(Path(__file__).parent)
    return f"import sys\n\nsys.path.insert(0, {folder!r})\n\n{_NODE}"
