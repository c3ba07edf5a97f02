"""The layers of a one-frame VAE, in place where they may, and what each does to positions and memory."""

import torch
from torch import nn
from torch.nn import functional as F

from ...planning.tile_geometry import LayerShape, Phase

# a norm works in up to this many pieces: where a backend has no fused kernel and widens bf16, it widens one piece
NORM_PIECES = 16
NORM_PIECE_VALUES = 2**20
# attention scores that exist at a time, in fp32: 64 MiB
QUERIES = 2048
KEYS = 8192


class Conv(nn.Module):
    """A 2D convolution, zero-padded to keep the size. Weights follow the input's dtype."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)  # (out, in, k, k)
        self.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def pad(self) -> int:
        return self.weight.shape[-1] // 2

    @property
    def shape(self) -> LayerShape:
        outputs, inputs = self.weight.shape[:2]
        return LayerShape(inputs, outputs, (Phase(1, 1),), before=self.pad, after=self.pad)

    def flops(self, positions: int) -> int:
        """Of so many input positions."""
        return 2 * self.weight.numel() * positions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.pad)


class Downsample(Conv):
    """A convolution of stride 2 that pads the end of each axis only."""

    @property
    def shape(self) -> LayerShape:
        outputs, inputs, kernel = self.weight.shape[:3]
        return LayerShape(inputs, outputs, (Phase(2, 1),), after=kernel - 1, stride=2)

    def flops(self, positions: int) -> int:
        return super().flops(positions) // 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        end = self.weight.shape[-1] - 2
        x = F.pad(x, (0, end, 0, end))
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), stride=2)


class Upsample(Conv):
    """Nearest-neighbour upsampling to twice the size, then a 3x3 convolution, without the upsampled image.

    Each of the four pixels that a pixel becomes meets only 2x2 different ones below the kernel, so the taps that
    meet the same one are added up: 16 multiplications instead of 36.
    """

    @property
    def shape(self) -> LayerShape:
        outputs, inputs = self.weight.shape[:2]
        return LayerShape(inputs, outputs, (Phase(1, 2),), before=self.pad, after=self.pad, up=2)

    def flops(self, positions: int) -> int:
        outputs, inputs = self.weight.shape[:2]
        return 2 * 16 * outputs * inputs * positions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, _, h, w = x.shape
        bias = self.bias.to(x.dtype)
        out = x.new_empty(b, 2 * h, 2 * w, self.weight.shape[0]).permute(0, 3, 1, 2)
        wide = self.weight.to(torch.promote_types(x.dtype, torch.float32))
        for row in range(2):
            for column in range(2):
                kernel = _merge_taps(_merge_taps(wide, 2, row), 3, column).to(x.dtype)
                # (B, C, h + 1, w + 1): pixel i of it has seen the pixels i - 1 and i of x
                merged = F.conv2d(x, kernel, bias, padding=1)
                out[:, :, row::2, column::2] = merged[:, :, row : row + h, column : column + w]
        return out


def _merge_taps(kernel: torch.Tensor, axis: int, phase: int) -> torch.Tensor:
    """Three taps to two: an even pixel's see the source pixel before, here, here; an odd one's here, here, after."""
    first, middle, last = kernel.unbind(axis)
    return torch.stack((first, middle + last) if phase == 0 else (first + middle, last), axis)


class Norm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels (diffusers' QwenImageRMS_norm), |x| in fp32."""

    def __init__(self, gamma: torch.Tensor) -> None:
        super().__init__()
        self.gamma = nn.Parameter(gamma, requires_grad=False)  # (C,)

    def forward(self, tokens: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(..., C) -> (..., C), into `out`, which may be the input."""
        channels = tokens.shape[-1]
        # diffusers divides by max(|x|, 1e-12): the same floor, as a mean of squares
        normed = F.rms_norm(tokens, (channels,), self.gamma.to(tokens.dtype), 1e-24 / channels)
        return normed if out is None else out.copy_(normed)


class NormSilu(nn.Module):
    """The norm and SiLU, over their input unless told otherwise."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm

    @property
    def shape(self) -> LayerShape:
        channels = self.norm.gamma.shape[0]
        return LayerShape(channels, channels, (Phase(1, 0),))

    def flops(self, positions: int) -> int:
        """None that count beside convolutions."""
        return 0

    def forward(self, x: torch.Tensor, *, in_place: bool = True) -> torch.Tensor:
        """(B, C, h, w) -> the same shape."""
        source = x.permute(0, 2, 3, 1)
        result = source if in_place else torch.empty_like(source)
        values_per_row = source.numel() // source.shape[1]
        rows = max(source.shape[1] // NORM_PIECES, NORM_PIECE_VALUES // values_per_row, 1)
        for part, out in zip(source.split(rows, 1), result.split(rows, 1), strict=True):
            F.silu(self.norm(part, out), inplace=True)
        return result.permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), three tensors at a time."""

    def __init__(self, norm1: NormSilu, conv1: Conv, norm2: NormSilu, conv2: Conv, shortcut: Conv | None) -> None:
        super().__init__()
        self.norm1 = norm1
        self.conv1 = conv1
        self.norm2 = norm2
        self.conv2 = conv2
        self.shortcut = shortcut

    @property
    def shape(self) -> LayerShape:
        pad = self.conv1.pad + self.conv2.pad
        outputs, inputs = self.conv1.weight.shape[:2]
        phases = (Phase(2, 1), Phase(1, 2))
        return LayerShape(inputs, outputs, phases, before=pad, after=pad)

    def flops(self, positions: int) -> int:
        convolutions = (self.conv1, self.conv2, self.shortcut)
        return sum(conv.flops(positions) for conv in convolutions if conv is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x, in_place=False)
        h = self.conv1(h)
        h = self.conv2(self.norm2(h))
        h += x if self.shortcut is None else self.shortcut(x)
        return h


class Attention(nn.Module):
    """Single-head self-attention over all pixels, added to its input in place.

    Scores exist for QUERIES x KEYS tokens at a time, on every backend, in fp32, with a running softmax
    (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
    """

    def __init__(self, norm: Norm, qkv: Conv, proj: Conv) -> None:
        super().__init__()
        self.norm = norm
        self.qkv = qkv
        self.proj = proj

    @property
    def shape(self) -> LayerShape:
        channels = self.proj.weight.shape[0]
        scratch = 4 * (QUERIES * KEYS + 2 * KEYS * channels + 8 * QUERIES * channels)
        return LayerShape(channels, channels, (Phase(3, 0, scratch),))

    def flops(self, positions: int) -> int:
        """Each position attends to all: a product for the score, and one for the sum."""
        channels = self.proj.weight.shape[0]
        return self.qkv.flops(positions) + self.proj.flops(positions) + 4 * channels * positions**2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        to_q, to_k, to_v = self.qkv.weight.to(x.dtype).reshape(3, channels, channels)
        bias_q, bias_k, bias_v = self.qkv.bias.to(x.dtype).reshape(3, channels)
        proj, bias_proj = self.proj.weight.to(x.dtype).reshape(channels, channels), self.proj.bias.to(x.dtype)
        for tokens in x.permute(0, 2, 3, 1).flatten(1, 2):  # (h * w, C), a view
            keys, values = torch.empty_like(tokens), torch.empty_like(tokens)
            for part, k, v in zip(tokens.split(QUERIES), keys.split(QUERIES), values.split(QUERIES), strict=True):
                normed = self.norm(part)
                k.copy_(F.linear(normed, to_k, bias_k))
                v.copy_(F.linear(normed, to_v, bias_v))
            # keys and values are complete, so each query's row of x is free once it has been read
            for part in tokens.split(QUERIES):
                seen = _attend(F.linear(self.norm(part), to_q, bias_q), keys, values)
                part += F.linear(seen, proj, bias_proj)
        return x


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(C)) v for some queries, (n, C), over all keys, a block of keys at a time."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    q = queries.to(wide) * queries.shape[1] ** -0.5
    mixed = torch.zeros_like(q)
    total = q.new_zeros(q.shape[0], 1)
    top = q.new_full((q.shape[0], 1), -torch.inf)
    for k, v in zip(keys.split(KEYS), values.split(KEYS), strict=True):
        scores = q @ k.to(wide).T
        new_top = torch.maximum(top, scores.amax(1, keepdim=True))
        fade = (top - new_top).exp_()
        scores.sub_(new_top).exp_()
        total.mul_(fade).add_(scores.sum(1, keepdim=True))
        mixed.mul_(fade).addmm_(scores, v.to(wide))
        top = new_top
    return mixed.div_(total).to(queries.dtype)
