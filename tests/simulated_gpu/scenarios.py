"""Runs of the transformer that streaming has to get right. Each returns what is to be the same, to the last bit."""

from collections.abc import Callable, Sequence

import torch
from qwenimage_lowvram.engine.compute.linear_choice import Computing, LinearChoice
from qwenimage_lowvram.engine.compute.product_trials import TRIALS
from qwenimage_lowvram.engine.compute.stored_products import FOR_ANY_DEVICE
from qwenimage_lowvram.engine.runs.expected_timesteps import ExpectedTimesteps
from qwenimage_lowvram.engine.streaming import RING_PIECES
from torch import Tensor

from .rig import TIMES, Lora, Rig, finish, host
from .tiny_models import LAYERS

BACKENDS = {trial.name: FOR_ANY_DEVICE for trial in TRIALS}
WORK_OF_WAITING = 5  # marks and waits before a block


class Interrupted(Exception):
    pass


def steps(
    rig: Rig,
    kind: str,
    *,
    resident: Sequence[int] = (),
    held: Sequence[int] = (),
    slots: int = 2,
    ring: int = RING_PIECES,
    lora: Lora = (),
    then: Lora | None = None,
    residuals: bool = False,
    chunk: int | None = None,
    prompts: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    computing: Computing = Computing.EXACT,
) -> list[Tensor]:
    """Two steps of one run; `then`: a second run with other LoRAs."""
    model = rig.transformer(kind, lora=lora, dtype=dtype, linear=LinearChoice(computing, BACKENDS))
    made: list[Tensor] = []
    for turn in range(1 if then is None else 2):
        if turn and then is not None:
            rig.patch(model, then)
        model.load(resident, held)
        model.modulation.announce(TIMES)
        with model.session(slots=slots, ring=ring, mlp_chunk_tokens=chunk) as session:
            for timestep in TIMES:
                branches = rig.branches(timestep, residuals=residuals, prompts=prompts, dtype=model.dtype)
                made += host(session.forward(branches, more=timestep != TIMES[-1]))
            assert session.waits.seconds >= 0
    finish(model)
    return made


def interrupted(
    rig: Rig, kind: str, *, at: int, more: bool, resident: Sequence[int] = (0,), held: Sequence[int] = (1,)
) -> list[Tensor]:
    """`on_block` raises in the middle of a step; the same session goes on; and a later session is left that way."""
    model = rig.transformer(kind)
    model.load(resident, held)
    model.modulation.announce(TIMES)
    made: list[Tensor] = []

    def stop(index: int) -> None:
        if index == at:
            raise Interrupted

    with model.session(slots=2) as session:
        _until_interrupted(lambda: session.forward(rig.branches(TIMES[0]), more=more, on_block=stop))
        made += host(session.forward(rig.branches(TIMES[0]), more=more))
        made += host(session.forward(rig.branches(TIMES[1])))

    def leave() -> None:
        with model.session(slots=2) as session:
            session.forward(rig.branches(TIMES[0]), more=more, on_block=stop)

    _until_interrupted(leave)
    finish(model)
    return made


def followed(rig: Rig, kind: str, *, resident: Sequence[int], held: Sequence[int] = ()) -> list[Tensor]:
    """What the card had been given when the block before was told of, but for copies' waits, is done."""
    model = rig.transformer(kind)
    model.load(resident, held)
    model.modulation.announce(TIMES)
    given: list[int] = []

    def tell(index: int) -> None:
        if rig.gpu is None:
            return
        stream = rig.gpu.current_stream()
        given.append(stream.done + stream.waiting)
        if len(given) > 1 and stream.done + WORK_OF_WAITING < given[-2]:
            raise AssertionError(f"block {index} is told of while {stream.waiting} pieces of work wait")

    with model.session(slots=2) as session:
        made = [answer for t in TIMES for answer in session.forward(rig.branches(t), on_block=tell)]
        made = host(made)
    finish(model)
    return made


def brought(rig: Rig, kind: str) -> list[Tensor]:
    """Blocks come from host memory to stay on the card: when one is told of, no more waits than the one before."""
    model = rig.transformer(kind)
    model.load((), range(LAYERS))
    model.modulation.announce(TIMES)
    with model.session(slots=2) as session:
        made = host(session.forward(rig.branches(TIMES[0])))
    waiting: list[int] = []

    def tell(index: int) -> None:
        if rig.gpu is not None:
            waiting.append(sum(stream.waiting for stream in rig.gpu.streams))
            if len(waiting) > 2 and waiting[-1] > waiting[1] + WORK_OF_WAITING:
                raise AssertionError(f"block {index} is told of while {waiting[-1]} pieces of work wait")

    model.load(range(LAYERS), on_block=tell)
    with model.session(slots=2) as session:
        made += host(session.forward(rig.branches(TIMES[1])))
    finish(model)
    return made


def shrunk(rig: Rig, kind: str, *, inside: bool, held: Sequence[int] = ()) -> list[Tensor]:
    """Resident blocks are taken between steps, or within one, while others are fetched ahead; then they are brought
    back; then all is given back, and the session goes on."""
    model = rig.transformer(kind)
    resident, times = (0, 1, 2), (1.0, 0.8, 0.6, 0.5)
    model.load(resident, held)
    model.modulation.announce(times)
    made: list[Tensor] = []
    block = model.footprint.resident_block_bytes

    def take(index: int) -> None:
        if inside and index == 1:
            model.shrink(block)

    with model.session(slots=2) as session:
        for i, timestep in enumerate(times):
            made += host(session.forward(rig.branches(timestep), more=timestep != times[-1], on_block=take))
            if i == 0:
                model.shrink(block)
            elif i == 1:
                model.store.set_held(())
                model.load(resident, ())
            elif i == 2:
                model.unload()
    finish(model)
    return made


def unannounced(rig: Rig, kind: str) -> list[Tensor]:
    """The weights of modulation are streamed beside open slots, for a timestep that nobody announced."""
    model = rig.transformer(kind)
    model.load((0,), (1,))
    model.modulation.announce(TIMES[:1])
    made: list[Tensor] = []
    with model.session(slots=2) as session:
        for timestep in TIMES:
            made += host(session.forward(rig.branches(timestep), more=timestep != TIMES[-1]))
    finish(model)
    return made


def several_moments(rig: Rig, kind: str) -> list[Tensor]:
    """Branches of one pass have timesteps of their own, announced or not; nobody waits for the device in between."""
    model = rig.transformer(kind)
    times = (1.0, 0.8, 0.6, 0.5)
    model.load((0,), (1,))
    model.modulation.announce(times)
    passes = ((1.0, 0.8), (0.8,), (0.7, 0.6), (0.6, 0.5), (0.3,))
    made: list[Tensor] = []
    with model.session(slots=2) as session:
        for together in passes:
            branches = [branch for timestep in together for branch in rig.branches(timestep)]
            made += session.forward(branches, more=together != passes[-1])
    finish(model)
    return host(made)


def expected(rig: Rig, kind: str, *, asked: Sequence[float]) -> list[Tensor]:
    """A sampler's timesteps lie on the device. Those that were announced are 1, 0.75, 0.5 and 0.25."""
    model, announced = rig.transformer(kind), (1.0, 0.75, 0.5, 0.25)
    model.load((0,), (1,))
    model.modulation.announce(announced)
    timesteps = ExpectedTimesteps(model.store.order, announced)
    made: list[Tensor] = []
    with model.session(slots=2) as session:

        def compute(values: Sequence[float], on_block: Callable[[int], None]) -> list[Tensor]:
            return session.forward(rig.branches(values[0]), more=values[0] > announced[-1], on_block=on_block)

        for timestep in asked:
            made += timesteps.run(torch.tensor([timestep], device=rig.hardware.device), compute, ahead=True)
    finish(model)
    return host(made)


def two_models(rig: Rig, kinds: Sequence[str]) -> list[Tensor]:
    """Their sessions are open at the same time, their steps come by turns."""
    models = [rig.transformer(kind) for kind in kinds]
    for model in models:
        model.load((0,), (1,))
        model.modulation.announce(TIMES)
    made: list[Tensor] = []
    with models[0].session(slots=2) as one, models[1].session(slots=2) as other:
        for timestep in TIMES:
            for session in (one, other):
                made += host(session.forward(rig.branches(timestep), more=timestep != TIMES[-1]))
            models[1].shrink(1)
    for model in models:
        finish(model)
    return made


def without_memory(rig: Rig, kind: str, *, fail_at: int) -> list[Tensor]:
    """One allocation finds none: what the run holds is given back, and the step is done again with less."""
    model = rig.transformer(kind)
    made: list[Tensor] = []
    if rig.gpu is not None:
        rig.gpu.allocator.fail_at = fail_at
    for resident, slots in (((0, 2), 2), ((), 1)):
        try:
            model.load(resident, (1,))
            model.modulation.announce(TIMES)
            with model.session(slots=slots) as session:
                for timestep in TIMES[len(made) :]:
                    made += host(session.forward(rig.branches(timestep), more=timestep != TIMES[-1]))
            break
        except torch.OutOfMemoryError:
            pass
        model.store.release()
    finish(model)
    return made


def _until_interrupted(action: Callable[[], object]) -> None:
    try:
        action()
    except Interrupted:
        return
    raise AssertionError("nothing was interrupted")
