"""What a VAE's layers do to positions and to memory, in integers. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A moment inside a layer: how many tensors of its input's and its output's size live at once, and scratch."""

    inputs: int
    outputs: int
    scratch_bytes: int = 0


@dataclass(frozen=True)
class LayerShape:
    """Output position i reads the input positions (i * stride - before) // up to (i * stride + after) // up.

    inside: layers that it runs one after another before its phases, while its input stays for a shortcut.
    """

    inputs: int
    outputs: int
    phases: tuple[Phase, ...]
    before: int = 0
    after: int = 0
    stride: int = 1
    up: int = 1
    inside: tuple["LayerShape", ...] = ()

    def size(self, length: int) -> int:
        return length * self.up // self.stride


@dataclass(frozen=True)
class Halo:
    """Latents that a tile reads beyond those it writes, towards the start and towards the end of an axis."""

    before: int
    after: int


def reach(layers: Sequence[LayerShape], first: int, last: int) -> tuple[int, int]:
    """The input positions, first to last, that the output positions first to last depend on."""
    for layer in reversed(layers):
        first = (first * layer.stride - layer.before) // layer.up
        last = (last * layer.stride + layer.after) // layer.up
    return first, last


def peak_bytes(layers: Sequence[LayerShape], height: int, width: int, itemsize: int) -> int:
    """Live bytes at the worst moment of running the layers one after another, the input included."""
    peak = 0
    for layer in layers:
        source = layer.inputs * height * width * itemsize
        if layer.inside:
            first, rest = layer.inside[:1], layer.inside[1:]
            inner = first[0].size(height), first[0].size(width)
            peak = max(peak, peak_bytes(first, height, width, itemsize), source + peak_bytes(rest, *inner, itemsize))
        height, width = layer.size(height), layer.size(width)
        result = layer.outputs * height * width * itemsize
        for phase in layer.phases:
            # scratch holds pieces of the tensor in fp32, a few at a time: never more than a few whole ones
            scratch = min(phase.scratch_bytes, 16 * max(source, result) // itemsize)
            peak = max(peak, phase.inputs * source + phase.outputs * result + scratch)
    return peak


def largest_tensor(layers: Sequence[LayerShape], height: int, width: int) -> int:
    """Values of the largest input or output of any layer."""
    largest = 0
    for layer in layers:
        largest = max(largest, layer.inputs * height * width, largest_tensor(layer.inside, height, width))
        height, width = layer.size(height), layer.size(width)
        largest = max(largest, layer.outputs * height * width)
    return largest


@dataclass(frozen=True)
class Network:
    """A decoder or an encoder: `whole` sees the whole image at latent resolution, `local` may run in tiles."""

    whole: tuple[LayerShape, ...]
    local: tuple[LayerShape, ...]
    is_encoder: bool

    @property
    def scale(self) -> int:
        """Pixels per latent along one axis."""
        scale = 1
        for layer in self.local:
            scale *= layer.up * layer.stride
        return scale

    @property
    def unit(self) -> int:
        """Input positions of `local` per latent."""
        return self.scale if self.is_encoder else 1

    @property
    def halo(self) -> Halo:
        """The halo that makes tiles exact, from kernel sizes and scales alone."""
        first, last = reach(self.local, 0, 0 if self.is_encoder else self.scale - 1)
        return Halo(before=-(first // self.unit), after=last // self.unit)

    @property
    def features(self) -> int:
        """Channels where `whole` and `local` meet."""
        return self.local[-1].outputs if self.is_encoder else self.local[0].inputs

    def peak_bytes(self, size: tuple[int, int], tile: tuple[int, int], itemsize: int) -> int:
        """Live bytes for an image of `size` latents in tiles that read `tile` latents; both (height, width)."""
        latents = size[0] * size[1]
        kept = self.features * latents * itemsize if tile != size else 0
        whole = peak_bytes(self.whole, *size, itemsize)
        local = peak_bytes(self.local, tile[0] * self.unit, tile[1] * self.unit, itemsize)
        # the decoder's latents, as they came in fp32 and in the dtype that is computed with
        source = 0 if self.is_encoder else self.whole[0].inputs * latents * (4 + itemsize)
        return source + max(whole, kept + local)

    def largest_tensor(self, tile: tuple[int, int]) -> int:
        """Values of the largest tensor that a tile of `tile` latents makes."""
        return largest_tensor(self.local, tile[0] * self.unit, tile[1] * self.unit)
