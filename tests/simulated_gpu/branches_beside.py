"""Branches of a pass on two cards at the same time, each with its own slots. As `scenarios`."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.planning.memory_plan import BranchDevice
from torch import Tensor

from . import seams
from .rig import TIMES, Lora, Rig, finish, host
from .scenarios import Interrupted


def branches_beside(
    rig: Rig,
    kind: str,
    *,
    first: Sequence[int] = (0, 3),
    second: tuple[int, ...] = (0,),
    held: Sequence[int] = (1,),
    own: int = 1,
    images: int = 1,
    slots: int = 2,
    lora: Lora = (),
    stop_at: int | None = None,
    shrink_at: int | None = None,
    residuals: bool = False,
) -> list[Tensor]:
    """Two prompts for each image, of which the first card computes `own` branches; `first` and `second`: the blocks
    that are resident on each. `stop_at`: a step is interrupted at that block, and made again. `shrink_at`: resident
    blocks are taken from the first card in the middle of a step."""
    model = rig.transformer(kind, lora=lora)
    beside: tuple[BranchDevice, ...] = ()
    if rig.other is not None:
        beside = seams.beside(model, rig.other.device, second, 2 * images - own)
    model.load(first, held, beside=beside)
    if rig.gpu is not None:
        there = model.secondaries[str(rig.other.device)]
        assert there.resident == set(second)
        assert model.store.fetched_blocks == len({*first, *second}), "a block that two cards keep is read once"
        assert not there.fetched_blocks
    model.modulation.announce(TIMES)
    made: list[Tensor] = []

    def at_block(index: int) -> None:
        if index == shrink_at:
            model.shrink(10**9)
        if index == stop_at:
            raise Interrupted

    with model.session(slots=slots, branches=own, beside=beside) as session:
        for timestep in TIMES:
            branches = several(rig, timestep, images, residuals)
            more = timestep != TIMES[-1]
            before = model.store.fetched_blocks
            if stop_at is not None:
                with suppress(Interrupted):
                    session.forward(branches, more=more, on_block=at_block)
            made += host(session.forward(branches, more=more, on_block=None if stop_at is not None else at_block))
            if rig.gpu is not None and stop_at is None and shrink_at is None:
                assert model.store.fetched_blocks - before <= model.footprint.blocks + slots
        assert session.waits.seconds >= 0
    finish(model)
    return made


def several(rig: Rig, timestep: float, images: int, residuals: bool) -> list[Branch]:
    made = []
    for image in range(images):
        made += rig.branches(timestep + image / 1000, residuals=residuals, prompts=2)
    return [replace(branch, timestep=timestep) for branch in made]


def one_card_fails(rig: Rig, kind: str, *, fail_at: int) -> list[Tensor]:
    """An allocation finds no memory; what the run holds is given back, and the step is done again on one card."""
    model = rig.transformer(kind)
    made: list[Tensor] = []
    if rig.gpu is not None:
        rig.gpu.allocator.fail_at = fail_at
    for together in (True, False):
        beside: tuple[BranchDevice, ...] = ()
        if rig.other is not None and together:
            beside = seams.beside(model, rig.other.device, (0,), 1)
        try:
            model.load((0, 2) if together else (), (1,), beside=beside)
            model.modulation.announce(TIMES)
            with model.session(slots=2 if together else 1, branches=1, beside=beside) as session:
                for timestep in TIMES[len(made) // 2 :]:
                    made += host(session.forward(several(rig, timestep, 1, False), more=timestep != TIMES[-1]))
            break
        except torch.OutOfMemoryError:
            pass
        for store in (model.store, *model.secondaries.values()):
            store.release()
    finish(model)
    return made
