"""One image's tokens over several processes: each has its part of them, and attends to all (DeepSpeed Ulysses).

Within attention each process has all tokens and its part of the heads: diffusers' attention processors exchange them
where they are given `Ranks.config`, and torch's scaled_dot_product_attention, which `attention_by` meets, is called
between both exchanges. All collectives are torch.distributed's. Knows no model.
"""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from ..errors import InvalidRequest, QwenLowVRAMError
from ..out_of_memory import shortage
from ..packages import diffusers_parallel
from .link import TYPICAL_LINK, Link


class RankLost(QwenLowVRAMError):
    """Another process of the image has ended, or did not answer in time: none of them can go on."""


@dataclass(frozen=True)
class Ranks:
    """The processes that make an image together. rank: of this one, from 0, among `count`; device: that it computes on.
    config: what makes a diffusers attention processor exchange with the others, over `link`."""

    rank: int
    count: int
    device: torch.device
    config: Any
    link: Link = TYPICAL_LINK

    @classmethod
    def of_group(cls, device: torch.device) -> "Ranks":
        """Of torch.distributed's default group, which all processes have joined: each of them calls this. The group
        needs a backend for the host beside that of the device."""
        from torch.distributed.device_mesh import DeviceMesh  # some builds of torch have none

        rank, count = distributed.get_rank(), distributed.get_world_size()
        alone = [distributed.new_group([i]) for i in range(count)][rank]  # without ring attention
        groups = [alone, distributed.group.WORLD]
        mesh = DeviceMesh.from_group(groups, device.type, mesh=[list(range(count))], mesh_dim_names=("ring", "ulysses"))
        parallel = diffusers_parallel()
        ulysses = parallel.ContextParallelConfig(ulysses_degree=count, ulysses_anything=True)
        config = parallel.ParallelConfig(context_parallel_config=ulysses)
        config.setup(rank, count, device, mesh=mesh)
        return cls(rank, count, device, config)

    @property
    def first(self) -> bool:
        """Whether this is the process that does what is done once."""
        return self.rank == 0

    def part(self, tensor: Tensor, dim: int) -> Tensor:
        """This process's part along `dim`: as diffusers splits it, the first are longer by one."""
        return tensor.tensor_split(self.count, dim)[self.rank]

    def whole(self, part: Tensor, tokens: int) -> Tensor:
        """(1, tokens, ...) of all parts (1, n, ...), in every process; each of them calls this. Raises `RankLost`."""
        longest = -(-tokens // self.count)
        sent = part.new_zeros(1, longest, *part.shape[2:])  # gloo gathers equal sizes alone
        sent[:, : part.shape[1]] = part
        gathered = [torch.empty_like(sent) for _ in range(self.count)]
        with self.watched():
            distributed.all_gather(gathered, sent)
        longer = tokens % self.count or self.count
        return torch.cat([one[:, : longest - (rank >= longer)] for rank, one in enumerate(gathered)], dim=1)

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Each process calls this. Raises InvalidRequest in all of them where one has other facts, and RankLost."""
        told: list[Any] = [None] * self.count
        with self.watched():
            distributed.all_gather_object(told, {name: str(fact) for name, fact in facts.items()})
        others = [(rank, name) for rank, theirs in enumerate(told) for name in facts if theirs[name] != told[0][name]]
        if others:
            rank, name = others[0]
            raise InvalidRequest(
                "The processes of one image were asked for different ones: process {rank} has another {name} ({its}) "
                "than process 0 ({first}).\n\nWhat to do: start all of them with the same files and settings.",
                code="ranks.differ",
                rank=rank,
                name=name,
                its=told[rank][name],
                first=told[0][name],
            )

    def wait(self) -> None:
        """Until all processes have come here. Raises RankLost."""
        with self.watched():
            distributed.all_gather_object([None] * self.count, None)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise RankLost where a collective fails within it."""
        try:
            yield
        except QwenLowVRAMError:
            raise
        except Exception as error:
            if shortage(error) is not None or not _of_collective(error):
                raise
            raise lost(self.rank, self.count, error) from error


def lost(rank: int, count: int, why: object) -> RankLost:
    """The error of a process that is left."""
    return RankLost(
        "Process {rank} of {count} has lost another one, without which the image cannot be made: {why:.500}\n\nWhat to "
        "do: look for the error of the process that ended first; then start all of them again.",
        code="ranks.lost",
        rank=rank,
        count=count,
        why=str(why),
    )


def part_of(ranks: Ranks | None, tensor: Tensor, dim: int = 1) -> Tensor:
    """Of one process all."""
    return tensor if ranks is None else ranks.part(tensor, dim)


def _of_collective(error: Exception) -> bool:
    """Whether it came out of torch.distributed: gloo's errors are plain RuntimeErrors."""
    modules = (str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(module.startswith("torch.distributed") for module in modules)
