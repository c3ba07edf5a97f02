"""The levels of 2.1's VAE, as Wan 2.2's are made: residual blocks and a change of size, with a shortcut around them."""

from collections.abc import Sequence

import torch
from torch import nn

from ...planning.tile_geometry import LayerShape, Phase

CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # of the 2x2 pixels that become one, or that one becomes


class DownLevel(nn.Module):
    """Layers that end in half the size, beside means of the image as it came: of 2x2 pixels each.

    The shortcut deals a video's channels, frames and pixels out into groups. Of the two frames that it halves where
    `halves_time`, an image has the second alone: the groups of the first are nothing (diffusers QwenImage21AvgDown3D).
    """

    def __init__(self, layers: Sequence[nn.Module], *, halves_time: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        frames = 2 if halves_time else 1
        shape = self.shape
        self._group = shape.inputs * frames * len(CORNERS) // shape.outputs
        self._channels = [
            _channels_of(shape.inputs, frames, corner, self._group, len(CORNERS)) for corner in range(len(CORNERS))
        ]

    @property
    def shape(self) -> LayerShape:
        inside = tuple(layer.shape for layer in self.layers)
        blocks = sum(layer.before for layer in inside[:-1])
        # what the last layer adds at the end of each axis, and the one pixel that the shortcut sees there
        return LayerShape(
            inside[0].inputs,
            inside[-1].outputs,
            (Phase(1, 1),),
            before=blocks,
            after=blocks + inside[-1].after,
            stride=inside[-1].stride,
            inside=inside,
        )

    def flops(self, positions: int) -> int:
        return _flops(self.layers, positions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _run(self.layers, x)
        for (row, column), channels in zip(CORNERS, self._channels, strict=True):
            out[:, channels].add_(x[:, :, row::2, column::2], alpha=1 / self._group)
        return out


class FlatLevel(nn.Module):
    """Layers that keep size and channels, added to their input."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def shape(self) -> LayerShape:
        inside = tuple(layer.shape for layer in self.layers)
        pad = sum(layer.before for layer in inside)
        return LayerShape(inside[0].inputs, inside[-1].outputs, (Phase(1, 1),), before=pad, after=pad, inside=inside)

    def flops(self, positions: int) -> int:
        return _flops(self.layers, positions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _run(self.layers, x).add_(x)


class UpLevel(nn.Module):
    """Layers that end in twice the size, beside the image as it came, each pixel four times.

    The shortcut deals the repeated channels out to channels, frames and pixels. Of the two frames that it makes where
    `doubles_time`, an image is the second (diffusers QwenImage21DupUp3D, first_chunk).
    """

    def __init__(self, layers: Sequence[nn.Module], *, doubles_time: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        frames = 2 if doubles_time else 1
        shape = self.shape
        repeats = shape.outputs * frames * len(CORNERS) // shape.inputs
        self._channels = [
            _channels_of(shape.outputs, frames, corner, repeats, len(CORNERS)) for corner in range(len(CORNERS))
        ]

    @property
    def shape(self) -> LayerShape:
        inside = tuple(layer.shape for layer in self.layers)
        blocks = inside[-1].up * sum(layer.before for layer in inside[:-1])
        return LayerShape(
            inside[0].inputs,
            inside[-1].outputs,
            (Phase(1, 1),),
            before=blocks + inside[-1].before,
            after=blocks + inside[-1].after,
            up=inside[-1].up,
            inside=inside,
        )

    def flops(self, positions: int) -> int:
        return _flops(self.layers, positions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _run(self.layers, x)
        for (row, column), channels in zip(CORNERS, self._channels, strict=True):
            out[:, :, row::2, column::2] += x[:, channels]
        return out


def _run(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _flops(layers: nn.ModuleList, positions: int) -> int:
    """Of so many input positions: no layer but the last changes their number."""
    return sum(layer.flops(positions) for layer in layers)


def _channels_of(channels: int, frames: int, corner: int, group: int, corners: int) -> slice:
    """Which channel of the other side each of `channels` meets at a corner, in the last of `frames`: all of them
    together are counted in the order channel, frame, corner, and `group` of them meet the same one."""
    met = [((channel * frames + frames - 1) * corners + corner) // group for channel in range(channels)]
    step = met[1] - met[0] if len(met) > 1 else 1
    found = slice(met[0], met[-1] + 1, step)
    if step < 1 or list(range(met[-1] + 1))[found] != met:
        raise ValueError(f"{channels} channels in groups of {group} are not those of Qwen-Image-2.1's VAE")
    return found
