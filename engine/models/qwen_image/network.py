"""Qwen-Image's transformer as a network: empty modules, which are diffusers' own, filled from a file's tensors."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...compute.linear_choice import DECODED, LinearChoice
from ...compute.token_chunks import ChunkedTokens
from ...files.checkpoint import Checkpoint
from ...hardware import Hardware
from ...packages import ATTENTION, diffusers_transformer
from ...streaming import BlockSource, FileSource, StoredBlock
from ..network import Network
from ..transformer_parts import TransformerParts
from .costs import QwenImageFootprint
from .tensors import BLOCKS, TransformerConfig, sort_transformer
from .variants import Variant

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock


class QwenImageParts(TransformerParts):
    """The parts of a Qwen-Image transformer's file. `config`, `variant`: what the file is."""

    footprint: QwenImageFootprint

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        hardware: Hardware,
        others: Sequence[Hardware] = (),
        variant: Variant | None = None,
        source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource,
        linear: LinearChoice = DECODED,
    ) -> None:
        """`others`: further devices that blocks may stay on. `variant` None: as the file says.

        Raises WrongModel, DamagedFile or MissingFile.
        """
        tensors = sort_transformer(checkpoint, variant)
        self.config = tensors.config
        self.variant = tensors.variant
        config = tensors.config
        network = Network(
            where=str(checkpoint.path),
            outside=tensors.outside,
            blocks=tensors.blocks,
            block_prefix=BLOCKS,
            inner_dim=config.inner_dim,
            make_outside=partial(_empty_outside, config, dtype),
            make_block=partial(_empty_block, config, dtype),
            make_modulation=partial(_empty_modulation, config, dtype),
            make_footprint=partial(
                QwenImageFootprint,
                head_dim=config.attention_head_dim,
                joint_attention_dim=config.joint_attention_dim,
                zero_cond_t=config.zero_cond_t,
            ),
        )
        super().__init__(network, dtype=dtype, hardware=hardware, others=others, source=source, linear=linear)


def _empty_outside(config: TransformerConfig, dtype: torch.dtype) -> "QwenImageTransformer2DModel":
    """diffusers' model without its blocks, to be computed with in `dtype`."""
    with torch.device("meta"):  # of this thread alone: while one plans, another may make modules with weights
        model = (
            diffusers_transformer()
            .QwenImageTransformer2DModel(
                in_channels=config.in_channels,
                out_channels=config.out_channels,
                num_layers=0,
                attention_head_dim=config.attention_head_dim,
                num_attention_heads=config.num_attention_heads,
                joint_attention_dim=config.joint_attention_dim,
                axes_dims_rope=config.axes_dims_rope,
                zero_cond_t=config.zero_cond_t,
                use_additional_t_cond=config.use_additional_t_cond,
                use_layer3d_rope=config.use_layer3d_rope,
            )
            .eval()
        )
    rope = model.pos_embed
    model.pos_embed = type(rope)(theta=rope.theta, axes_dim=rope.axes_dim, scale_rope=rope.scale_rope)  # its tables
    if dtype == torch.float16:
        model.txt_norm = _WideNorm(model.txt_norm)
    return model


def _whole_block(config: TransformerConfig, dtype: torch.dtype) -> "QwenImageTransformerBlock":
    with torch.device("meta"):
        block = diffusers_transformer().QwenImageTransformerBlock(
            dim=config.inner_dim,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            zero_cond_t=config.zero_cond_t,
        )
    attn = block.attn
    attn.processor._attention_backend = ATTENTION  # not what the environment or another pack sets for diffusers
    if dtype == torch.float16:
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(attn, name, _WideNorm(getattr(attn, name)))
    return block.eval()


def _empty_block(config: TransformerConfig, dtype: torch.dtype) -> nn.Module:
    block = _whole_block(config, dtype)
    block.img_mod, block.txt_mod = _FromTable(), _FromTable()
    block.img_mlp, block.txt_mlp = ChunkedTokens(block.img_mlp), ChunkedTokens(block.txt_mlp)
    return block


def _empty_modulation(config: TransformerConfig, dtype: torch.dtype) -> nn.Module:
    block = _whole_block(config, dtype)
    part = nn.Module()
    part.img_mod, part.txt_mod = block.img_mod, block.txt_mod
    return part


class _FromTable(nn.Module):
    """Stands in a block where its modulation weights were, and returns what they would have computed."""

    value: Tensor

    def forward(self, temb: Tensor) -> Tensor:
        return self.value


class _WideNorm(nn.Module):
    """diffusers' RMSNorm with a weight in fp16, which does not make its result as narrow."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self._eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self._eps)
