"""A file's linear layer by itself, as a block that passes through a slot."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from qwenimage_lowvram.engine.compute.linear_choice import LinearChoice
from qwenimage_lowvram.engine.compute.stored_linear import StoredLinear
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.formats import FORMATS
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.streaming import BlockFiles, BlockStreamer
from torch import Tensor, nn


def an_input(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    """With columns that are far larger than others, as the model's have."""
    x = torch.randn(1, tokens, columns, generator=torch.Generator().manual_seed(tokens))
    x[..., :: columns // 8] *= 30
    return x.to(dtype)


def make_layer(columns: int, rows: int) -> nn.Module:
    module = nn.Module()
    with torch.device("meta"):
        module.layer = nn.Linear(columns, rows)
    return module


@contextmanager
def streamed(
    file: Path, columns: int, rows: int, dtype: torch.dtype, choice: LinearChoice, hardware: Hardware
) -> Iterator[StoredLinear]:
    """The layer that the file holds as `layer`, computed on as it is stored."""
    tensors = FORMATS.described_tensors(open_checkpoint(file))
    files = BlockFiles([tensors], partial(make_layer, columns, rows), dtype, file.name, product_of=choice.product_of)
    store = files.open(hardware)
    assert store.blocks[0].native
    with BlockStreamer(store, slots=1) as streamer:
        for _, block in streamer.visit():
            assert isinstance(block.layer, StoredLinear)
            yield block.layer
