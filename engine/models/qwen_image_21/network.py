"""Qwen-Image-2.1's transformer as a network: empty modules, filled from a file's tensors."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from ...compute.linear_choice import DECODED, LinearChoice
from ...files.checkpoint import Checkpoint
from ...hardware import Hardware
from ...streaming import BlockSource, FileSource, StoredBlock
from ..network import Network
from ..transformer_parts import TransformerParts
from .costs import QwenImage21Footprint
from .layers import Block, HalfAttention, Outside
from .tensors import BLOCKS, JOINED_LAYER, SPLIT_LAYERS, TransformerConfig, sort_transformer


class QwenImage21Parts(TransformerParts):
    """The parts of a Qwen-Image-2.1 transformer's file. `config`: what the file is."""

    footprint: QwenImage21Footprint

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        hardware: Hardware,
        others: Sequence[Hardware] = (),
        source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource,
        linear: LinearChoice = DECODED,
    ) -> None:
        """`others`: further devices that blocks may stay on. Raises WrongModel, DamagedFile or MissingFile."""
        tensors = sort_transformer(checkpoint)
        self.config = config = tensors.config
        block = partial(Block, attention=HalfAttention) if dtype == torch.float16 else Block
        network = Network(
            where=str(checkpoint.path),
            outside=tensors.outside,
            blocks=tensors.blocks,
            block_prefix=BLOCKS,
            inner_dim=config.inner_dim,
            make_outside=partial(_on_meta, Outside, config),
            make_block=partial(_on_meta, block, config),
            make_footprint=partial(
                QwenImage21Footprint,
                head_dim=config.head_dim,
                prompt_dim=config.prompt_dim,
                mlp_dim=config.mlp_dim,
            ),
            joined_layers={JOINED_LAYER: SPLIT_LAYERS},
            model="Qwen-Image-2.1",
        )
        super().__init__(network, dtype=dtype, hardware=hardware, others=others, source=source, linear=linear)


def _on_meta(kind: Callable[[TransformerConfig], nn.Module], config: TransformerConfig) -> nn.Module:
    with torch.device("meta"):
        return kind(config).eval()
