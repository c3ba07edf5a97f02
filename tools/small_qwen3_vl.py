"""Make a small Qwen3-VL of the real architecture with random weights, and write it as its users have it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFWriter
from gguf_files import add_tensor, write_writer
from safetensors.torch import load_file, save_file
from small_checkpoint import randomize
from torch import Tensor

# by the heads' size, as 24, 20 and 20 of heads of 128
_SECTIONS = {32: (6, 5, 5), 64: (12, 10, 10), 128: (24, 20, 20)}
LEAST_PX = 65_536  # the published processor's
_DEEPSTACK_PARTS = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}
_MERGER = {"norm": "v.post_ln", "linear_fc1": "mm.0", "linear_fc2": "mm.2"}


@dataclass(frozen=True)
class Size:
    """`hidden` is also what the transformer takes. positions: of the table of learned positions, along each side."""

    hidden: int = 64
    layers: int = 4
    heads: int = 2
    kv_heads: int = 1
    intermediate: int = 128
    vision_hidden: int = 32
    vision_layers: int = 5
    vision_heads: int = 2
    vision_intermediate: int = 64
    positions: int = 6
    deepstack: tuple[int, ...] = (1, 2, 4)


def make_qwen3_vl(tokenizer: Any, size: Size = Size(), *, seed: int = 2) -> torch.nn.Module:
    """transformers' Qwen3-VL with its head, as the real folder has it."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))

    head_dim = size.hidden // size.heads
    # as the published file has it, which transformers 4 and 5 read
    rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": list(_SECTIONS[head_dim])}
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "head_dim": head_dim,
            "vocab_size": -(-(len(tokenizer) + 1) // 256) * 256,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_scaling": rope,
            "rope_theta": 5e6,
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_intermediate,
            "num_heads": size.vision_heads,
            "out_hidden_size": size.hidden,
            "num_position_embeddings": size.positions**2,
            "deepstack_visual_indexes": list(size.deepstack),
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    model = Qwen3VLForConditionalGeneration(config)
    return randomize(model, seed, lambda name: name.endswith(("norm.weight", "norm1.weight", "norm2.weight")))


def make_processor(tokenizer: Any, *, least_px: int = LEAST_PX) -> Any:
    """transformers' processor, as the pipeline's folder holds it."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    half = [0.5, 0.5, 0.5]
    pixels = {"shortest_edge": least_px, "longest_edge": 16_777_216}
    images = Qwen2VLImageProcessor(patch_size=16, image_mean=half, image_std=half, size=pixels)
    turns = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content[0].text }}<|im_end|>\n"
        "{% endfor %}"
    )
    return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(patch_size=16), chat_template=turns)


def write_comfyui_file(file: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A folder's encoder as one file, which holds its configuration: a small model's heads cannot be told from
    shapes."""
    weights = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, file, metadata={"config": (folder / "config.json").read_text(encoding="utf-8")})
    return file


def write_gguf_encoder(file: Path, folder: Path, kind: str, architecture: str = "qwen3vl") -> Path:
    """The language model, by llama.cpp's names and settings: matrices of type `kind`, vectors F32."""
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    rope = text.get("rope_parameters") or {**text["rope_scaling"], "rope_theta": text["rope_theta"]}  # transformers 4
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3VL, text["num_hidden_layers"])
    for name, value in load_file(folder / "model.safetensors").items():
        if "visual." not in name:
            bare = name.replace("language_model.", "")
            own = names.get_name(bare, try_suffixes=(".weight", ".bias"))
            add_tensor(writer, own or bare, value, kind if value.ndim == 2 else "F32")
    write_writer(writer)
    return file


def write_gguf_mmproj(file: Path, folder: Path, kind: str, projector: str = "qwen3vl_merger") -> Path:
    """The vision part as llama.cpp's converter has it (Qwen3VLVisionModel): the 3D kernel as two 2D ones, the mergers
    of the deepstack numbered by their blocks. Matrices of type `kind`, vectors F32; of the kernel F16 or F32."""
    vision = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vision_config"]
    writer = GGUFWriter(file, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", projector)
    writer.add_uint32("clip.vision.block_count", vision["depth"])
    writer.add_uint32("clip.vision.embedding_length", vision["hidden_size"])
    writer.add_uint32("clip.vision.feed_forward_length", vision["intermediate_size"])
    writer.add_uint32("clip.vision.attention.head_count", vision["num_heads"])
    writer.add_uint32("clip.vision.patch_size", vision["patch_size"])
    writer.add_uint32("clip.vision.spatial_merge_size", vision["spatial_merge_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision["depth"])
    for name, value in load_file(folder / "model.safetensors").items():
        if "visual." in name:
            for own, piece, stored in _vision_pieces(name.split("visual.")[1], value, kind, vision, names):
                add_tensor(writer, own, piece, stored)
    write_writer(writer)
    return file


def _vision_pieces(
    name: str, value: Tensor, kind: str, vision: Mapping[str, Any], names: gguf.TensorNameMap
) -> list[tuple[str, Tensor, str]]:
    """Names in the mmproj, values and types of a tensor's pieces."""
    stored = kind if value.ndim == 2 else "F32"
    if value.ndim == 5:
        of_kernel = "F32" if kind == "F32" else "F16"
        return [(f"v.patch_embd.weight{'.1' * i}", value[:, :, i], of_kernel) for i in range(value.shape[2])]
    group, part, ending = name.split(".")[0], name.split(".")[-2], name.split(".")[-1]
    if group == "deepstack_merger_list":
        block = vision["deepstack_visual_indexes"][int(name.split(".")[1])]
        return [(f"v.deepstack.{block}.{_DEEPSTACK_PARTS[part]}.{ending}", value, stored)]
    if group == "merger":
        return [(f"{_MERGER[part]}.{ending}", value, stored)]
    own = names.get_name(f"visual.{name}", try_suffixes=(".weight", ".bias"))
    return [(own or name, value, stored)]
