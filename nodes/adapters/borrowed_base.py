"""The parts of a transformer that ComfyUI's Fun ControlNet borrows from the model it controls."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import comfy.ldm.flux.layers
import comfy.ldm.qwen_image.model
from torch import Tensor, nn
from torch.func import functional_call

from ...engine.compute.stored_linear import StoredLinear

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


class BorrowedBase:
    """Computes in the dtype of what it is given, as ComfyUI's own layers do: ControlNets may have another than ours.
    Layers that compute on their weights as stored are given these as they are."""

    patch_size = 2
    process_img = comfy.ldm.qwen_image.model.QwenImageTransformer2DModel.process_img

    def __init__(self, head_dim: int, rope_axes: Sequence[int], outside: "QwenImageTransformer2DModel") -> None:
        self.pe_embedder = comfy.ldm.flux.layers.EmbedND(dim=head_dim, theta=10000, axes_dim=list(rope_axes))
        self.img_in, self.txt_in = _casting(outside.img_in), _casting(outside.txt_in)
        self.txt_norm, self.time_text_embed = _casting(outside.txt_norm), _casting(outside.time_text_embed)


def _casting(module: nn.Module) -> Callable[..., Tensor]:
    stored = {
        f"{name}.{part}" if name else part
        for name, layer in module.named_modules()
        if isinstance(layer, StoredLinear)
        for part, _ in layer.named_parameters()
        if part != "bias"
    }

    def call(*inputs: Tensor) -> Tensor:
        weights = {
            name: weight if name in stored else weight.to(inputs[-1].dtype)
            for name, weight in module.named_parameters()
        }
        result: Tensor = functional_call(module, weights, inputs)
        return result

    return call
