"""A headless process that torchrun has started beside others, to make images together: joins them, and leaves.

with ranks_of_torchrun() as ranks, Pipeline.open(folder, ranks=ranks) as pipeline:
    latents = pipeline.make_latents("a cat", width=1328, height=1328, seed=1)
    if ranks.first:
        image = pipeline.decode(latents)[0]
"""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from types import FrameType

import torch
from torch import distributed

from ..compute.context_parallel import RankLost, Ranks, lost
from ..compute.step_schedules import FirstBlockRule, StepCache
from ..environment import variable
from ..errors import InvalidRequest, Unsupported
from .machine_speeds import measure_link

# a process waits for the others so long: from disks of their own, they may load for minutes
TIMEOUT_SECONDS = 600.0
# what torchrun tells a process
_RANK, _COUNT, _OF_MACHINE = "RANK", "WORLD_SIZE", "LOCAL_RANK"
_BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "cpu:gloo"}


@contextmanager
def ranks_of_torchrun(
    *, device: torch.device | None = None, timeout_seconds: float = TIMEOUT_SECONDS
) -> Iterator[Ranks]:
    """The processes of this torchrun; left on every way out. device None: the card of this process's number on its
    machine, else the CPU. The link between them is measured, which takes a second where it is slow.

    Where another process ends, this one raises RankLost: over gloo at once, as the connection breaks, and at the latest
    after `timeout_seconds`; and where torchrun tells it to end (SIGTERM), which it does to all when one has failed.
    From then on SIGTERM is ignored: the process is to end.
    Raises InvalidRequest without torchrun, for one process, and for more of them than the machine has cards, and
    Unsupported for devices other than CUDA's, ROCm's and the CPU.
    """
    rank, count, number = _told()
    device = device or _device_of(number)
    if device.type not in _BACKENDS or not distributed.is_available():
        raise Unsupported(
            "Processes on {device} cannot make an image together: NVIDIA's and AMD's cards and the CPU can, with a "
            "torch that has torch.distributed.",
            code="ranks.no_such_device",
            device=str(device),
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _told_to_end(rank, count):
        try:
            try:
                _join(_BACKENDS[device.type], timedelta(seconds=timeout_seconds))
                ranks = Ranks.of_group(device)
                ranks = replace(ranks, link=measure_link(device, ranks.count))
            except RuntimeError as error:
                raise lost(rank, count, error) from error
            yield ranks
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()


@contextmanager
def together(ranks: Ranks | None, asked: Mapping[str, object], cache: StepCache | None) -> Iterator[None]:
    """One image's sampling, to which each of the processes comes; None: of this one alone. asked: what has to be the
    same in all of them, or they would wait for each other in different places.

    Raises as `Ranks.require_same`, Unsupported for a step cache on which they might not agree, and RankLost.
    """
    if ranks is None:
        yield
        return
    ranks.require_same(asked)
    if isinstance(cache, FirstBlockRule):
        raise Unsupported(
            "step_cache {name} decides by numbers of the image, about which several processes might not agree."
            "\n\nWhat to do: set step_cache to off, or to a table.",
            code="ranks.first_block",
            name=cache.name,
        )
    with ranks.watched():
        yield
    ranks.wait()  # whoever ends now takes nothing from the others


def _join(backends: str, timeout: timedelta) -> None:
    """Under names of its own in torchrun's store, where those of an earlier group of these processes still are."""
    store, rank, count = next(distributed.rendezvous("env://", timeout=timeout))
    joined = store.add(f"times that process {rank} joined", 1)
    own = distributed.PrefixStore(f"group {joined}", store)
    distributed.init_process_group(backends, store=own, rank=rank, world_size=count, timeout=timeout)


def _told() -> tuple[int, int, int]:
    """Of this process: its number, how many there are, and its number on its machine."""
    told = [variable(name) for name in (_RANK, _COUNT, _OF_MACHINE)]
    if not all(text.isdecimal() for text in told) or int(told[1]) < 2:
        raise InvalidRequest(
            "One image by several processes needs torchrun, and two processes or more.\n\nWhat to do: start them with "
            "`python -m torch.distributed.run --nproc-per-node=2`, followed by the file and its arguments.",
            code="ranks.no_torchrun",
        )
    rank, count, number = map(int, told)
    return rank, count, number


def _device_of(number: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    cards = torch.cuda.device_count()
    if number >= cards:
        raise InvalidRequest(
            "{processes} processes were started on a machine with {cards} cards.\n\nWhat to do: start one process for "
            "each card, with --nproc-per-node={cards}.",
            code="ranks.too_few_cards",
            processes=number + 1,
            cards=cards,
        )
    return torch.device("cuda", number)


@contextmanager
def _told_to_end(rank: int, count: int) -> Iterator[None]:
    """SIGTERM within it is an error, so that what is held is given back."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise lost(rank, count, "torchrun ended this process, as it does with all of them when one has failed.")

    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread hear signals
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except RankLost:
        before = signal.SIG_IGN  # torchrun's may still come: the process ends by itself, and says why
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
