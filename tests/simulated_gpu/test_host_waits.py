"""Where the host waits for the device: within a step for nothing younger than a block, in a pass over the modulation
weights once, at its end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.runs.expected_timesteps import ExpectedTimesteps
from torch import Tensor

from . import beside, kept_prefix
from .device import HostWait, SimulatedGPU
from .rig import PIECE_BYTES, Rig, finish, host
from .seams import small_pieces
from .tiny_models import LAYERS, TinyModels

pytestmark = pytest.mark.slow
TIMES = (1.0, 0.8, 0.6, 0.4)
LORA = (("lora", 1.0), ("dora", 0.7))


class Watched:
    """What the thread that issues work waited for within `during`, and copies that could not be asynchronous."""

    def __init__(self, gpu: SimulatedGPU) -> None:
        self._gpu = gpu
        self.waits: list[HostWait] = []
        self.pageable = 0

    @contextmanager
    def during(self) -> Iterator[None]:
        before, pageable, here = len(self._gpu.waits), self._gpu.pageable.total(), self._gpu.threads.here().name
        yield
        self.waits += [wait for wait in self._gpu.waits[before:] if wait.thread == here]
        self.pageable += self._gpu.pageable.total() - pageable

    def younger_than(self, kernels: int) -> list[str]:
        return [str(wait) for wait in self.waits if wait.kernels_since < kernels]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bf16", {"resident": (), "held": (0, 2)}),
        ("int8", {"resident": (0,), "held": (1,), "lora": LORA}),
        ("nf4", {"resident": (0, 3), "held": (1,)}),
        ("GGUF", {"resident": (0,), "held": (1,)}),
        ("fp8", {"resident": (0, 1, 2, 3, 4), "held": ()}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_step_waits_for_nothing_younger_than_a_block(
    kind: str, options: dict[str, Any], tiny_models: TinyModels
) -> None:
    with SimulatedGPU("late") as gpu, small_pieces(PIECE_BYTES):
        rig, first, later = Rig(tiny_models, gpu), Watched(gpu), Watched(gpu)
        compute, kernels, made = gpu.current_stream(), [], list[Tensor]()
        model = rig.transformer(kind, lora=options.get("lora", ()))
        model.load(options["resident"], options["held"])
        model.modulation.announce(TIMES)
        steps = [rig.branches(timestep, residuals=True, prompts=2) for timestep in TIMES]
        with model.session(slots=2) as session:
            for branches in steps:
                issued = []
                with (first if not made else later).during():
                    made += session.forward(
                        branches,
                        more=branches is not steps[-1],
                        on_block=lambda index, issued=issued: issued.append(compute.kernels),
                    )
                kernels += [after - before for before, after in pairwise(issued)]
        host(made)
        finish(model)
    assert len(kernels) == len(TIMES) * (LAYERS - 1)
    assert not later.younger_than(min(kernels))
    assert not later.pageable
    # the tables of the image and of the two prompts; the image's goes with each prompt's
    assert [wait for wait in first.younger_than(min(kernels)) if "rotary_tables.py of" not in wait] == []
    assert len(first.younger_than(min(kernels))) == 4


@pytest.mark.parametrize("remade", [0, 2])
def test_a_step_of_2_1_waits_for_nothing_younger_than_a_block(remade: int, tiny_models: TinyModels) -> None:
    """Prompt and references are kept in part on the card, in part in host memory, and in part made anew."""
    with SimulatedGPU("late") as gpu, small_pieces(PIECE_BYTES):
        rig, first, later = Rig(tiny_models, gpu), Watched(gpu), Watched(gpu)
        compute, kernels, made = gpu.current_stream(), [], list[Tensor]()
        model = rig.transformer_21()
        model.load((1,), (0,), (), kept_prefix.tiers(remade, 1))
        with model.session(slots=2) as session:
            for timestep in TIMES:
                branches = kept_prefix.branches(rig, timestep, 0)
                issued: list[int] = []
                with (first if not made else later).during():
                    made += session.forward(
                        branches,
                        more=timestep != TIMES[-1],
                        on_block=lambda index, issued=issued: issued.append(compute.kernels),
                    )
                if kernels or made:
                    kernels += [after - before for before, after in pairwise(issued)]
        host(made)
        finish(model)
    assert not later.younger_than(min(kernels))
    assert not later.pageable
    # of the references, of each prompt behind them, and of the image behind each prompt
    assert len([wait for wait in first.younger_than(min(kernels)) if "rotary_tables.py bring" in wait]) == 5


def test_a_pass_over_the_modulation_weights_waits_once(tiny_models: TinyModels) -> None:
    with SimulatedGPU("late") as gpu, small_pieces(PIECE_BYTES):
        watched, model = Watched(gpu), Rig(tiny_models, gpu).transformer("int8")
        model.load(())
        with watched.during():
            model.modulation.announce([1 - i / 20 for i in range(20)])
        finish(model)
    computing = [wait for wait in watched.younger_than(20) if "the compute stream" in wait]
    # moments, one a block, are looked at when it is over
    assert len([wait for wait in computing if "seconds_between" not in wait]) == 1
    assert "modulation.py _compute" in computing[-1]
    assert not watched.pageable


def test_a_samplers_timesteps_are_known_without_waiting_for_the_step_before(tiny_models: TinyModels) -> None:
    with SimulatedGPU("late") as gpu, small_pieces(PIECE_BYTES):
        rig, first, later = Rig(tiny_models, gpu), Watched(gpu), Watched(gpu)
        model, compute_stream, issued, made = rig.transformer("int8"), gpu.current_stream(), [], list[Tensor]()
        model.load((0,), (1,))
        announced = torch.tensor(TIMES).tolist()
        model.modulation.announce(announced)
        steps = {timestep: rig.branches(timestep) for timestep in announced}
        sigmas = torch.tensor(announced, device="cuda:0")
        with model.session(slots=2) as session:

            def compute(values: list[float], on_block: Callable[[int], None]) -> list[Tensor]:
                def begin_block(index: int) -> None:
                    issued.append(compute_stream.kernels)
                    on_block(index)

                return session.forward(steps[values[0]], more=values[0] > announced[-1], on_block=begin_block)

            timesteps = ExpectedTimesteps(model.store.order, announced)
            for sigma in sigmas:
                asked = sigma * torch.ones(1, device="cuda:0")
                with (later if made else first).during():
                    made += timesteps.run(asked, compute, ahead=True)
        host(made)
        finish(model)
    assert len(issued) == len(TIMES) * LAYERS
    assert not later.younger_than(issued[1] - issued[0])
    assert not later.pageable


def test_layers_of_the_text_encoder_wait_for_nothing_and_blocks_of_its_vision_part_twice(
    tiny_models: TinyModels,
) -> None:
    with SimulatedGPU("late") as gpu, small_pieces(PIECE_BYTES):
        encoder = beside.text_encoder(Rig(tiny_models, gpu))
        seen, watched = Watched(gpu), Watched(gpu)
        begun: list[int] = []
        with watched.during():
            encoder.encode(beside.PROMPTS, on_layer=lambda index: begun.append(len(gpu.waits)))
        with seen.during():
            encoder.vision_tower().see(beside.shown_images(), on_block=lambda index: begun.append(len(gpu.waits)))
    within = [
        str(wait) for wait in gpu.waits[begun[0] : begun[3]] if wait.kernels_since < 10 and "copy to" in wait.what
    ]
    assert not within
    answers = [wait for wait in watched.waits if wait.what == "copy to the host"]
    assert len(answers) == len(beside.PROMPTS)
    # where the windows begin, and where the images do; before the blocks the sizes of images; and the answer
    asked = [wait for wait in gpu.waits[begun[4] :] if wait.what == "copy to the host"]
    assert len(asked) == 3
