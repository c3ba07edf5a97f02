"""Qwen-Image at its real size without its weights: checkpoints that are headers only, and a source that reads nothing.

Under torch's FakeTensorMode the full model then runs on any machine, and its memory can be counted.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, TensorEntry
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.lora_file import LoraFile
from transformers import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}


class EmptySource:
    """Leaves the buffers as they are."""

    def __init__(self, blocks: object) -> None:
        pass

    def read(self, index: int, out: torch.Tensor, start: int = 0) -> None:
        pass

    def close(self) -> None:
        pass


def fake_gpu() -> Hardware:
    """A CUDA device of which fake tensors can be made: no streams, no pinning, no threads."""
    return Hardware(torch.device("cuda"), streams=False, pinned=False, prefetch=False, host_device=False)


def transformer_checkpoint(
    dtype: torch.dtype = torch.bfloat16, *, layers: int = 60, layered: bool = False
) -> Checkpoint:
    """The 20 B transformer: every Linear weight inside the blocks in `dtype`, the rest in bf16 where dtype is fp8.
    `layered`: Qwen-Image-Layered's."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=1, use_additional_t_cond=layered)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in [name for name in shapes if name.startswith("transformer_blocks.0.")]:
        for i in range(1, layers):
            shapes[name.replace(".0.", f".{i}.", 1)] = shapes[name]
    return checkpoint_of("transformer", shapes, dtype)


def text_encoder_checkpoint(dtype: torch.dtype = torch.bfloat16, *, layers: int = 28) -> Checkpoint:
    """Qwen2.5-VL-7B's language model."""
    config = Qwen2_5_VLTextConfig(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=1
    )
    with torch.device("meta"):
        layer = Qwen2_5_VLDecoderLayer(config, 0)
    shapes = {f"model.layers.{i}.{name}": tuple(p.shape) for i in range(layers) for name, p in layer.named_parameters()}
    shapes["model.embed_tokens.weight"] = (152064, 3584)
    shapes["model.norm.weight"] = (3584,)
    return checkpoint_of("text_encoder", shapes, dtype)


def vae_checkpoint(dtype: torch.dtype = torch.bfloat16, *, channels: int = 3) -> Checkpoint:
    """Of RGB images; Qwen-Image-Layered's has 4 channels."""
    with torch.device("meta"):
        model = AutoencoderKLQwenImage(base_dim=96, z_dim=16, input_channels=channels)
    return checkpoint_of("vae", {name: tuple(p.shape) for name, p in model.named_parameters()}, dtype)


def lightning_lora(weights: Mapping[str, tuple[int, ...]], *, rank: int = 64) -> LoraFile:
    """As Lightning's files: rank 64 in bf16 on every matrix of attention and MLPs, 0.85 GB; header only."""
    tensors = {}
    for name, shape in weights.items():
        if name.startswith("transformer_blocks.") and len(shape) == 2 and "_mod." not in name:
            layer = name.removesuffix(".weight")
            for part, size in (("lora_up", (shape[0], rank)), ("lora_down", (rank, shape[1]))):
                tensors[f"{layer}.{part}.weight"] = TensorEntry(Path("lora"), 0, 2 * size[0] * size[1], "BF16", size)
    return LoraFile(Path("lora"), tensors, {}, "lora")


def write_header(checkpoint: Checkpoint | LoraFile, file: Path) -> Path:
    """A safetensors file of the checkpoint's header and of nothing else, which takes no room on most disks."""
    header, end = {}, 0
    for name, entry in checkpoint.tensors.items():
        begin, end = end, end + entry.nbytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + end)
    return file


def checkpoint_of(name: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Checkpoint:
    tensors = {}
    for key, shape in shapes.items():
        in_block = key.startswith("transformer_blocks.") or ".layers." in key
        stored = dtype if dtype.itemsize > 1 or (in_block and len(shape) == 2) else torch.bfloat16
        tensors[key] = TensorEntry(Path(name), 0, prod(shape) * stored.itemsize, NAMES[stored], shape)
    return Checkpoint(Path(name), tensors, {}, None, name)
