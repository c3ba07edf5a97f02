"""Runs that are left, robbed or broken in the middle, while blocks are read and copied ahead. As `scenarios`."""

import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from qwenimage_lowvram.engine.errors import MissingFile
from torch import Tensor

from .rig import PIECE_BYTES, TIMES, Rig, finish, host
from .scenarios import Interrupted

READ_SECONDS = 0.004


def left(rig: Rig, kind: str, *, slots: int = 2) -> list[Tensor]:
    """Sessions are left at several blocks, while reads are under way; the last goes to its end."""
    model = rig.transformer(kind)
    model.load((0,), (1,))
    model.modulation.announce(TIMES[:1])
    _slow_reads(model)
    for at in (1, 3):

        def stop(index: int, at: int = at) -> None:
            if index == at:
                raise Interrupted

        with suppress(Interrupted), model.session(slots=slots) as session:
            session.forward(rig.branches(TIMES[0]), more=True, on_block=stop)
    with model.session(slots=2) as session:
        made = host(session.forward(rig.branches(TIMES[0])))
    finish(model)
    return made


def left_beside_rows(rig: Rig, kind: str, *, stop_at: int) -> list[Tensor]:
    """The pass over the modulation weights is left; then a session, while the next step's row is brought."""
    model = rig.transformer(kind)
    model.load((0,), ())

    def stop(index: int) -> None:
        if index == stop_at:
            raise Interrupted

    with suppress(Interrupted):
        model.modulation.announce(TIMES, on_block=stop)
    model.modulation.announce(TIMES)
    made: list[Tensor] = []
    for timestep in TIMES:
        with model.session(slots=2) as session:
            made += session.forward(rig.branches(timestep))
    finish(model)
    return host(made)


def taken(rig: Rig, kind: str, *, what: str, inside: Collection[int] = ()) -> list[Tensor]:
    """What is fetched ahead loses its source: resident or held blocks, or all, are given back behind each step; or at
    the blocks `inside` of it."""
    model = rig.transformer(kind)
    model.load(() if what == "held" else (0, 1), (0, 1) if what == "held" else ())
    model.modulation.announce(TIMES)
    _slow_reads(model)
    give_back: Callable[[], Any] = {
        "resident": lambda: model.shrink(10**9),
        "all": model.store.release,
        "held": lambda: model.store.set_held(()),
    }[what]

    def on_block(index: int) -> None:
        if index in inside:
            time.sleep(1.5 * READ_SECONDS)
            give_back()

    made: list[Tensor] = []
    with model.session(slots=2) as session:
        for timestep in TIMES:
            velocities = session.forward(rig.branches(timestep), more=timestep != TIMES[-1], on_block=on_block)
            if not inside:
                give_back()  # nobody has waited for the device since
            made += host(velocities)
            if what == "held":
                model.store.set_held((0, 1))
    finish(model)
    return made


def unreadable(
    rig: Rig, kind: str, fail: Collection[tuple[int, int]] = ((2, PIECE_BYTES), (4, 0)), slots: int = 2
) -> list[Tensor]:
    """One of several reads that are under way fails at once, the others go on for a while; the session goes on.
    `fail`: (block, first byte) of the reads that fail, once each."""
    model = rig.transformer(kind)
    model.load((0,), (1,))
    model.modulation.announce(TIMES[:1])
    _slow_reads(model, fail)
    made: list[Tensor] = []
    with model.session(slots=slots) as session:
        for turn in range(3):
            with suppress(MissingFile):
                made = host(session.forward(rig.branches(TIMES[0]), more=turn < 2))
    finish(model)
    return made


def _slow_reads(model: Any, fail: Collection[tuple[int, int]] = ()) -> None:
    """Reads take time, so that who leaves in the middle leaves in the middle of one. The first read of each (block,
    first byte) of `fail` raises."""
    source = model.store.source
    read, failing = source.read, set(fail)

    def slowly(index: int, out: Tensor, start: int = 0) -> None:
        if (index, start) in failing:
            failing.discard((index, start))
            raise MissingFile("The file is gone.", code="test.gone")
        time.sleep(READ_SECONDS)
        read(index, out, start)

    source.read = slowly
