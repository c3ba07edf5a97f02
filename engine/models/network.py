"""What the other rooms ask of a transformer's network, whichever it is: a value made from its file's header.

A network is a folder of this room. It says where its tensors lie, how empty modules of it are made, what its passes
take, and how what goes through its blocks begins and ends. Streaming and planning need no more.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..compute.half_products import in_half
from ..files.checkpoint import TensorEntry
from ..planning.footprint import TransformerFootprint
from ..streaming import OnBlock, Waits


@dataclass(frozen=True)
class Network:
    """A transformer's tensors and empty modules. Holds no weight.

    where: the file's name in errors. outside, blocks: tensors by their names in the modules that make_outside,
    make_block and make_modulation return, whose parameters are on the meta device (buffers are real). These three must
    not refer to anything that holds weights. block_prefix: stands before a block's number in the model's own names.
    make_modulation: the part of a block that sees the timestep alone, and is computed beforehand; None without one.
    make_footprint: the network's footprint from the sizes that TransformerFootprint has. joined_layers: as
    `layer_rows.other_names` takes them. model: what a person calls it.
    """

    where: str
    outside: Mapping[str, TensorEntry]
    blocks: Sequence[Mapping[str, TensorEntry]]
    block_prefix: str
    inner_dim: int
    make_outside: Callable[[], nn.Module]
    make_block: Callable[[], nn.Module]
    make_footprint: Callable[..., TransformerFootprint]
    make_modulation: Callable[[], nn.Module] | None = None
    joined_layers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    model: str = "Qwen-Image"

    def in_half(self) -> "Network":
        """The same whose linear layers multiply weights in fp16, between activations in fp32."""
        return replace(
            self,
            make_outside=partial(_in_half, self.make_outside),
            make_block=partial(_in_half, self.make_block),
            make_modulation=None if self.make_modulation is None else partial(_in_half, self.make_modulation),
        )


def _in_half(make: Callable[[], nn.Module]) -> nn.Module:
    return in_half(make())


class Branch(Protocol):
    """One forward pass: a prompt for one image. What else it holds, its network knows."""

    @property
    def timestep(self) -> float:
        """Sigma, 0..1."""


class State(Protocol):
    """What one forward pass carries from block to block."""

    @property
    def tokens(self) -> int:
        """That a block sees at a time."""

    def move(self, device: torch.device) -> None:
        """Hand everything that blocks are given on to `device`."""

    def run(self, index: int, block: nn.Module) -> None:
        """Through block `index`."""

    def add_residuals(self, index: int) -> None:
        """Of ControlNets, behind block `index`."""


class StepTable(Protocol):
    """What blocks compute of the timestep alone, computed beforehand and kept in host memory."""

    @property
    def waits(self) -> Waits: ...

    @property
    def fetched_bytes(self) -> int: ...

    @property
    def copied_bytes(self) -> int: ...

    def knows(self, timesteps: Iterable[float]) -> bool:
        """Announcing these reads nothing."""

    def announce(self, timesteps: Iterable[float], *, on_block: OnBlock | None = None) -> None:
        """A run will ask for these: compute what is missing, in one pass over the weights."""

    def forget(self) -> None:
        """Give back everything."""

    def leave_device(self) -> None:
        """Give back what lies on the device."""


class NothingBeforehand:
    """The table of a network whose blocks compute all of themselves."""

    def __init__(self) -> None:
        self.waits = Waits()
        self.fetched_bytes = self.copied_bytes = 0

    def knows(self, timesteps: Iterable[float]) -> bool:
        return True

    def announce(self, timesteps: Iterable[float], *, on_block: OnBlock | None = None) -> None:
        pass

    def forget(self) -> None:
        pass

    def leave_device(self) -> None:
        pass


class Gate(Protocol):
    """Decides behind the first block which branches go on."""

    def behind_first(self, before: Sequence[Tensor], behind: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Of the tokens of each branch's image before and behind the first block: what is taken for those behind the
        last one; None for a branch that goes on."""


@dataclass(frozen=True)
class Hooked:
    """`hook` is called around each block for the branches of these indices, together; the network says with what."""

    branches: range
    hook: Any
