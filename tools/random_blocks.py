"""A transformer of the real architecture in a file of random weights, written cheaply: one block is drawn, for all.

At the real width (24 heads of 128) a block is 0.68 GB in bf16, so that a few of them tell what sixty do.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from math import prod, sqrt
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint
from torch import Tensor

REAL_BLOCKS = 60
REAL_HEADS = 24
REAL_TEXT_DIM = 3584
_BLOCKS = "transformer_blocks."
_FILE = "diffusion_pytorch_model.safetensors"
_SIZES = {"BF16": 2, "I8": 1, "F32": 4}

_Part = tuple[str, str, tuple[int, ...]]  # name in the file, dtype, shape


class Stored(Enum):
    """How the matrices of attention and MLPs are stored; everything else is bf16."""

    BF16 = "bf16"
    INT8 = "int8"


def write_transformer(
    folder: Path,
    *,
    layers: int,
    heads: int = REAL_HEADS,
    text_dim: int = REAL_TEXT_DIM,
    stored: Stored = Stored.BF16,
    distinct: bool = False,
) -> Path:
    """Write a folder that `open_checkpoint` reads, and diffusers too where it is bf16; returns the file of weights.

    All blocks have the same bytes, or, where they are to be `distinct`, the same rows in another order. Weights are
    scaled by their fan-in, so that activations keep their size. The file is on the disk when this returns.
    """
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(
            num_layers=layers, num_attention_heads=heads, attention_head_dim=128, joint_attention_dim=text_dim
        )
    model.save_config(folder)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    parts = [part for name, shape in shapes.items() for part in _parts(name, shape, stored)]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in parts:
        begin, end = end, end + prod(shape) * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    file = folder / _FILE
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, Tensor] = {}
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for name, dtype, shape in parts:
            key = name.split(".", 2)[2] if name.startswith(_BLOCKS) else name
            if key not in drawn:
                drawn[key] = _draw(key, dtype, shape, generator)
            moved = int(name.split(".")[1]) if distinct and name != key else 0
            stream.write(drawn[key].roll(moved, 0).view(torch.uint8).numpy().tobytes())
        stream.flush()
        os.fsync(stream.fileno())  # only what is on the disk can leave the file cache
    return file


def repeat_blocks(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """The same model with `layers` blocks: those that its file has, over and over."""
    numbered = [name.split(".", 2) for name in checkpoint.tensors if name.startswith(_BLOCKS)]
    count = len({index for _, index, _ in numbered})
    rest = {name: entry for name, entry in checkpoint.tensors.items() if not name.startswith(_BLOCKS)}
    blocks = {
        f"{_BLOCKS}{i}.{name}": checkpoint.tensors[f"{_BLOCKS}{index}.{name}"]
        for _, index, name in numbered
        for i in range(int(index), layers, count)
    }
    config = None if checkpoint.config is None else {**checkpoint.config, "num_layers": layers}
    return replace(checkpoint, tensors={**rest, **blocks}, config=config)


def _parts(name: str, shape: tuple[int, ...], stored: Stored) -> Iterator[_Part]:
    """int8 as bitsandbytes has it: each row's largest absolute value beside the numbers."""
    matrix = name.startswith(_BLOCKS) and len(shape) == 2 and "_mod." not in name
    if matrix and stored is Stored.INT8:
        yield name, "I8", shape
        yield f"{name.removesuffix('weight')}SCB", "F32", shape[:1]
    else:
        yield name, "BF16", shape


def _draw(key: str, dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if dtype == "I8":
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    if dtype == "F32":
        return torch.full(shape, 0.01)
    scale = 0.3 / sqrt(shape[-1]) if len(shape) > 1 else 0.02
    return (torch.randn(shape, generator=generator) * scale + ("norm" in key)).bfloat16()
