"""diffusers' own model on the decoded weights of a file: the card with room for everything, and who offloads it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.network import QwenImageParts
from torch import Tensor, nn

from .steps import SIGMA, Inputs, Ready

Weights = list[dict[str, Tensor]]


@contextmanager
def resident(checkpoint: Checkpoint, count: int, inputs: Inputs, device: torch.device) -> Iterator[Ready]:
    """Everything on the device; the file's blocks run over and over, `count` in all."""
    model, weights = _opened(checkpoint, device)
    blocks = [_block(block) for block in weights]
    model.transformer_blocks = nn.ModuleList(blocks[i % len(blocks)] for i in range(count))
    model.to(device)
    yield Ready(_steps(model, inputs, device), count)


@contextmanager
def group_offload(checkpoint: Checkpoint, count: int, inputs: Inputs, device: torch.device) -> Iterator[Ready]:
    """diffusers' fastest: block by block on a stream of its own, from page-locked memory."""
    model, weights = _opened(checkpoint, torch.device("cpu"))
    model.transformer_blocks = nn.ModuleList(_block(weights[i % len(weights)]) for i in range(count))
    streams = device.type == "cuda"
    apply_group_offloading(
        model,
        onload_device=device,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=streams,
        record_stream=streams,
        non_blocking=streams,
    )
    yield Ready(_steps(model, inputs, device), count)


def _steps(model: nn.Module, inputs: Inputs, device: torch.device) -> Callable[[bool], list[Tensor]]:
    @torch.no_grad()
    def step(more: bool) -> list[Tensor]:
        return [
            model(
                hidden_states=inputs.tokens,
                encoder_hidden_states=prompt,
                timestep=torch.full((1,), SIGMA, device=device, dtype=torch.bfloat16),
                img_shapes=[[inputs.grid]],
                return_dict=False,
            )[0]
            for prompt in inputs.prompts
        ]

    return step


def _opened(checkpoint: Checkpoint, device: torch.device) -> tuple[nn.Module, Weights]:
    """diffusers' model without blocks, and each block's weights, decoded by our codecs on `device`."""
    hardware = Hardware.detect(device)
    parts = QwenImageParts(checkpoint, dtype=torch.bfloat16, hardware=hardware)
    model = parts.network.make_outside()
    parts.read_outside().put_into(model, parts.network.make_outside)
    weights: Weights = [{} for _ in parts.store.blocks]
    assert parts.modulation_store is not None
    for store in (parts.store, parts.modulation_store):
        for index, block in enumerate(weights):
            (slot,) = store.new_slots()
            store.order.after_compute()
            store.fetch_into(index, slot)
            store.order.finish()
            block |= {name: parameter.data for name, parameter in store.module_in(slot, index).named_parameters()}
        store.release()
    return model, weights


def _block(weights: dict[str, Tensor]) -> nn.Module:
    heads = weights["attn.to_q.weight"].shape[0] // weights["attn.norm_q.weight"].shape[0]
    head_dim = weights["attn.norm_q.weight"].shape[0]
    with torch.device("meta"):
        block = QwenImageTransformerBlock(dim=heads * head_dim, num_attention_heads=heads, attention_head_dim=head_dim)
    block.load_state_dict(weights, assign=True)
    return block.eval()
