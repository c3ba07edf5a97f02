"""Progress moves with the card and interruptions are obeyed within two blocks' time, and no step is slower for it."""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest

from . import seams
from .costs import Rates
from .device import SimulatedGPU
from .mutations import ordering_calls
from .rig import Rig, finish, host
from .tiny_models import LAYERS, TinyModels

pytestmark = pytest.mark.slow
ALL, HALF = tuple(range(LAYERS)), (0, 3)
TIMES = (1.0, 0.7, 0.4)
FLOPS = 1e9
STAYS_NEAR = next(call for call in ordering_calls() if call.name == "streamer._stay_near: host_waits")


@dataclass
class Told:
    """When a run tells of its blocks, in simulated seconds: the host's moment, and when the card is done with all that
    it was given before."""

    gpu: SimulatedGPU
    at: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, *progress: int) -> None:
        self.at.append((time.perf_counter(), self.gpu.current_stream().seconds))

    def require_near(self, block_seconds: float) -> None:
        """When the third and each later block is told of, the last but one is done; and within a step the card
        has still all of the last to do."""
        for i, ((_, before), _, (now, ready)) in enumerate(zip(self.at, self.at[1:], self.at[2:], strict=False), 2):
            assert now > before + 0.999 * block_seconds, f"at {i} the host is far ahead of the card"
            if i % LAYERS > 1:
                assert ready - now > 0.999 * block_seconds, f"at {i} the card runs dry"


def steps(
    models: TinyModels, costs: Rates, *, resident: Any, slots: int, second: range | None = None, stays_near: bool = True
) -> tuple[Told, float]:
    """Three steps of a transformer, and when the card is done with them. Not `stays_near`: without the host's waits."""
    with SimulatedGPU("late", costs=costs) as gpu, nullcontext() if stays_near else STAYS_NEAR.removed():
        rig = Rig(models, gpu)
        model = rig.transformer("bf16")
        assert rig.other is not None
        there = () if second is None else seams.on_second(rig.other.device, second)
        model.load(resident, ALL, there)
        model.modulation.announce(TIMES)
        told = Told(gpu)
        branches = [rig.branches(timestep) for timestep in TIMES]
        with seams.session(model, slots, there) as session:
            begun = time.perf_counter()
            for i, branch in enumerate(branches):
                answers = session.forward(branch, more=i + 1 < len(TIMES), on_block=told)
            host(answers)
            seconds = time.perf_counter() - begun
        finish(model)
    return told, seconds


@pytest.fixture(scope="module")
def block_seconds(tiny_models: TinyModels) -> float:
    """Of computing alone."""
    told, _ = steps(tiny_models, Rates(flops=FLOPS), resident=ALL, slots=1)
    return told.at[2][1] - told.at[1][1]


@pytest.mark.parametrize(
    ("resident", "slots", "bus_bytes"),
    [((), 1, 1e6), ((), 2, 1e9), (HALF, 2, 1e6), (HALF, 3, 1e9), (ALL, 2, 1e9)],
)
def test_the_host_is_told_of_a_block_while_the_card_is_at_the_one_before(
    resident: Any, slots: int, bus_bytes: float, tiny_models: TinyModels, block_seconds: float
) -> None:
    told, _ = steps(tiny_models, Rates(flops=FLOPS, bus_bytes=bus_bytes), resident=resident, slots=slots)
    assert len(told.at) == len(TIMES) * LAYERS
    told.require_near(block_seconds)


@pytest.mark.parametrize(("resident", "bus_bytes"), [((), 1e7), (HALF, 1e9), (ALL, 1e9)])
def test_no_step_is_slower_for_the_hosts_waiting(resident: Any, bus_bytes: float, tiny_models: TinyModels) -> None:
    """A host that takes nearly as long to issue a block as the card takes for it."""
    costs = Rates(flops=FLOPS, bus_bytes=bus_bytes, issue_seconds=1e-5)
    _, seconds = steps(tiny_models, costs, resident=resident, slots=2)
    _, without = steps(tiny_models, costs, resident=resident, slots=2, stays_near=False)
    assert seconds == pytest.approx(without, rel=0.01)
