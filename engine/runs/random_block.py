"""A transformer with one block of Qwen-Image's size, of random weights in memory, where there is no file of one yet."""

import json
from dataclasses import dataclass
from enum import Enum
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..files.checkpoint import Checkpoint, TensorEntry
from ..models.qwen_image.tensors import BLOCKS
from ..packages import diffusers_transformer

HEAD_DIM = 128
_PLACE = Path("random weights")  # of which no file is there
_NUMBERS = 1 << 20  # that are drawn; they are repeated, which costs nothing and is as busy as others
_SPREAD = 0.005  # of weights: about what keeps the size of what goes through a layer


class Stored(Enum):
    """How the matrices of the block are stored; everything else is bf16. INT8 as ComfyUI has it, row by row."""

    BF16 = "bf16"
    INT8 = "int8"


@dataclass(frozen=True)
class BlockSize:
    """Of the transformer's width, heads * HEAD_DIM, and of its prompts'."""

    heads: int = 24
    prompt_dim: int = 3584

    @property
    def inner_dim(self) -> int:
        return self.heads * HEAD_DIM


REAL = BlockSize()


def random_block_bytes(size: BlockSize = REAL) -> int:
    """Of host memory that `random_block` takes, whose tensors all lie in the same bytes, with a copy of what is
    streamed of it, and twice as much again while weights are read."""
    return 2 * (12 + 3 * 24) * size.inner_dim**2 + 6 * _NUMBERS


def random_block(stored: Stored, size: BlockSize = REAL) -> Checkpoint:
    """As a file of it would be opened."""
    with torch.device("meta"):
        model = diffusers_transformer().QwenImageTransformer2DModel(
            num_layers=1,
            num_attention_heads=size.heads,
            attention_head_dim=HEAD_DIM,
            joint_attention_dim=size.prompt_dim,
        )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    drawn = torch.randn(_NUMBERS, generator=torch.Generator().manual_seed(0)) * _SPREAD
    data = _repeated(drawn.bfloat16(), 2 * max(map(prod, shapes.values())))
    scales = _bytes(torch.full((max(shape[0] for shape in shapes.values()),), _SPREAD / 127 * 2))
    tensors: dict[str, TensorEntry] = {}
    layers = {}
    for name, shape in shapes.items():
        quantized = stored is Stored.INT8 and name.startswith(BLOCKS) and len(shape) == 2 and "_mod." not in name
        tensors[name] = _entry("I8" if quantized else "BF16", shape, data)
        if quantized:
            layer = name.removesuffix(".weight")
            tensors[f"{layer}.weight_scale"] = _entry("F32", (shape[0], 1), scales)
            layers[layer] = {"format": "int8_tensorwise"}
    notes = {"_quantization_metadata": json.dumps({"layers": layers})} if layers else {}
    return Checkpoint(_PLACE, tensors, notes, None, "")


def _entry(dtype: str, shape: tuple[int, ...], data: memoryview) -> TensorEntry:
    nbytes = prod(shape) * {"I8": 1, "BF16": 2, "F32": 4}[dtype]
    return TensorEntry(_PLACE, 0, nbytes, dtype, shape, data[:nbytes])


def _repeated(numbers: Tensor, nbytes: int) -> memoryview:
    return _bytes(numbers.repeat(-(-nbytes // numbers.nbytes)))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())
