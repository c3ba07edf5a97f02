"""Build the decoder and the encoder of one frame from diffusers' tensors: every causal Conv3d becomes a Conv2d."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ...errors import DamagedFile
from ...planning.tile_geometry import Network
from .layers import Attention, Conv, Downsample, Norm, NormSilu, ResidualBlock, Upsample


class Half(nn.Module):
    """A decoder or an encoder: layers that need the whole image, and layers that may run in tiles."""

    def __init__(self, whole: Iterable[nn.Module], local: Iterable[nn.Module], *, is_encoder: bool) -> None:
        super().__init__()
        self.whole = nn.ModuleList(whole)
        self.local = nn.ModuleList(local)
        self.network = Network(
            tuple(layer.shape for layer in self.whole), tuple(layer.shape for layer in self.local), is_encoder
        )

    def flops(self, latents: int, work: float) -> float:
        """Of a decoder, for so many latents: the local layers compute `work` pixels for each of the image."""
        total, positions = sum(layer.flops(latents) for layer in self.whole), latents
        for layer in self.local:
            total += work * layer.flops(positions)
            positions *= layer.shape.up**2
        return float(total)


def build_decoder(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Half:
    """Latents -> RGB(A) in -1..1: the middle block whole, the up blocks local."""
    parts = Parts(tensors, dtype)
    whole = [parts.conv("post_quant_conv"), parts.conv("decoder.conv_in"), *parts.middle("decoder.mid_block")]
    local: list[nn.Module] = []
    for block in range(parts.count("decoder.up_blocks")):
        prefix = f"decoder.up_blocks.{block}"
        local += [parts.residual(f"{prefix}.resnets.{i}") for i in range(parts.count(f"{prefix}.resnets"))]
        for i in range(parts.count(f"{prefix}.upsamplers")):
            local.append(Upsample(*parts.folded(f"{prefix}.upsamplers.{i}.resample.1")))
    local += [parts.norm_silu("decoder.norm_out"), parts.conv("decoder.conv_out")]
    return Half(whole, local, is_encoder=False)


def build_encoder(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Half:
    """RGB(A) in -1..1 -> the mean of the posterior: the down blocks local, the middle block whole."""
    parts = Parts(tensors, dtype)
    local: list[nn.Module] = [parts.conv("encoder.conv_in")]
    for block in range(parts.count("encoder.down_blocks")):
        prefix = f"encoder.down_blocks.{block}"
        if f"{prefix}.resample.1.weight" in tensors:
            local.append(Downsample(*parts.folded(f"{prefix}.resample.1")))
        else:
            local.append(parts.residual(prefix))
    weight, bias = parts.folded("quant_conv")
    mean = Conv(weight[: weight.shape[0] // 2].clone(), bias[: bias.shape[0] // 2].clone())
    head = [parts.norm_silu("encoder.norm_out"), parts.conv("encoder.conv_out"), mean]
    return Half([*parts.middle("encoder.mid_block"), *head], local, is_encoder=True)


class Parts:
    """Makes layers from tensors by name, folded to one frame, in one dtype, channels last."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self.tensors = tensors
        self.dtype = dtype

    def count(self, prefix: str) -> int:
        """How many numbered children a name has."""
        start = prefix.count(".") + 1
        return len({key.split(".")[start] for key in self.tensors if key.startswith(prefix + ".")})

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise DamagedFile(
                "The VAE has no tensor {name}: the file is incomplete or mixed up. Download it again.",
                code="vae.tensor_missing",
                name=name,
            )
        return self.tensors[name]

    def folded(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (out, in, k, k) and bias; a causal kernel's last time tap alone ever meets the only frame."""
        weight = self.tensor(f"{name}.weight")
        weight = weight[:, :, -1] if weight.ndim == 5 else weight
        weight = weight.to(self.dtype, memory_format=torch.channels_last, copy=True)
        return weight, self.tensor(f"{name}.bias").to(self.dtype, copy=True)

    def conv(self, name: str) -> Conv:
        return Conv(*self.folded(name))

    def norm(self, name: str) -> Norm:
        return Norm(self.tensor(f"{name}.gamma").flatten().to(self.dtype, copy=True))

    def norm_silu(self, name: str) -> NormSilu:
        return NormSilu(self.norm(name))

    def residual(self, name: str) -> ResidualBlock:
        shortcut = self.conv(f"{name}.conv_shortcut") if f"{name}.conv_shortcut.weight" in self.tensors else None
        return ResidualBlock(
            self.norm_silu(f"{name}.norm1"),
            self.conv(f"{name}.conv1"),
            self.norm_silu(f"{name}.norm2"),
            self.conv(f"{name}.conv2"),
            shortcut,
        )

    def middle(self, name: str) -> list[nn.Module]:
        attention = f"{name}.attentions.0"
        return [
            self.residual(f"{name}.resnets.0"),
            Attention(self.norm(f"{attention}.norm"), self.conv(f"{attention}.to_qkv"), self.conv(f"{attention}.proj")),
            self.residual(f"{name}.resnets.1"),
        ]
