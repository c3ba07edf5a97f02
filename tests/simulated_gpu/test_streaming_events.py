"""The discrete-event model of a step takes as long as the engine does on a simulated card, whose rates are known."""

import time
from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from qwenimage_lowvram.engine.planning.overlap import RING_PIECES, Way
from streaming_events import Job, Machine, Sampling

from . import seams
from .costs import Rates
from .device import SimulatedGPU
from .rig import Rig, finish, host
from .test_learning import step_seconds
from .tiny_models import LAYERS, TinyModels

pytestmark = pytest.mark.slow
TIMES = (1.0, 0.8, 0.6, 0.4, 0.2)
FLOPS = 1e5
NEAR = 0.05
# pieces of the ring, and the part of a block that each is: four that hold half a block, unless said
RING = (RING_PIECES, 0.15)
RINGS = {
    "the disk, one slot": (RING_PIECES, 0.05),
    "the disk, a small ring": (RING_PIECES, 0.05),
    "int8 from 3.5 GB/s": (6, 0.148),
    "int8 from 7 GB/s": (12, 0.148),
    "bf16, half in RAM": (16, 0.074),
}

ALL, NONE, TWO = range(LAYERS), (), (0, 3)
# name: (kind, resident, held, slots, a block's copy and its read in blocks' computing, of a launch)
CASES: dict[str, tuple[str, Collection[int], Collection[int], int, float, float, float]] = {
    "computing": ("bf16", NONE, ALL, 2, 0.5, 0.5, 0.0),
    "one slot": ("bf16", NONE, ALL, 1, 0.5, 0.5, 0.0),
    "the bus": ("bf16", NONE, ALL, 2, 2.0, 0.5, 0.0),
    "the bus, some stay": ("bf16", TWO, ALL, 2, 2.0, 0.5, 0.0),
    "the disk": ("bf16", NONE, NONE, 2, 0.5, 2.0, 0.0),
    "the disk, one slot": ("bf16", NONE, NONE, 1, 0.5, 2.0, 0.0),
    "the disk, some held": ("bf16", NONE, TWO, 2, 0.5, 3.0, 0.0),
    "the disk, a small ring": ("bf16", NONE, TWO, 2, 0.5, 3.0, 0.0),
    "the disk, three slots": ("bf16", NONE, TWO, 3, 0.5, 3.0, 0.0),
    "decoding": ("int8", NONE, ALL, 2, 0.2, 0.2, 1.0),
    "decoding, one slot": ("int8", NONE, ALL, 1, 0.5, 0.5, 1.0),
    "decoding what stays": ("int8", TWO, ALL, 2, 0.8, 0.2, 1.0),
    "decoding and the disk": ("int8", TWO, NONE, 2, 0.3, 1.5, 1.0),
    # as in benchmarks/bounds.py
    "int8 from 3.5 GB/s": ("int8", (0,), NONE, 2, 0.57, 1.94, 0.09),
    "int8 from 7 GB/s": ("int8", (0,), NONE, 2, 0.43, 1.49, 0.14),
    "bf16, half in RAM": ("bf16", NONE, TWO, 2, 0.24, 1.65, 0.0),
}


def engine_seconds(
    models: TinyModels,
    rates: Rates,
    kind: str,
    resident: Collection[int],
    held: Collection[int],
    slots: int,
    ring: int,
    part: float,
) -> list[float]:
    """Of each step, at whose end the host waits for the card."""
    with SimulatedGPU("late", costs=rates) as gpu:
        rig = Rig(models, gpu)
        model = rig.transformer(kind)
        with seams.small_pieces(int(part * model.store.raw_bytes)):
            model.load(resident, [index for index in held if index not in resident])
            model.modulation.announce(TIMES)
            gpu.accelerator.synchronize()
            with model.session(slots=slots, ring=ring) as session:
                moments = [time.perf_counter()]
                for timestep in TIMES:
                    host(session.forward(rig.branches(timestep), more=timestep > TIMES[-1]))
                    moments.append(time.perf_counter())
            finish(model)
    return [end - begin for begin, end in pairwise(moments)]


@pytest.mark.parametrize("case", CASES)
def test_the_model_takes_as_long_as_the_engine_on_a_simulated_card(case: str, tiny_models: TinyModels) -> None:
    kind, resident, held, slots, copy, read, launch = CASES[case]
    ring, part = RINGS.get(case, RING)
    rates = Rates(flops=FLOPS)
    block = step_seconds(tiny_models, rates)[0] / LAYERS
    sizes = _sizes(tiny_models, kind)
    if launch:  # of which a block's decoding takes as long as computing it did
        rates = replace(rates, launch_seconds=launch * block / sizes["launches"])
        block = step_seconds(tiny_models, rates)[0] / LAYERS
    nbytes = sum(sizes["groups"])
    rates = replace(rates, bus_bytes=nbytes / (copy * block), disk_bytes=nbytes / (read * block))
    ways = [Way.STAYS if index in resident else Way.HELD if index in held else Way.READ for index in range(LAYERS)]
    job = Job(
        ways,
        sizes["groups"],
        decode_seconds=sizes["launches"] * rates.launch_seconds,
        compute_seconds=block,
        branches=1,
        slots=slots,
        ring_pieces=ring,
        piece_bytes=int(part * nbytes),
    )
    never = float("inf")
    machine = Machine(
        bus_bytes=rates.bus_bytes,
        disk_bytes=rates.disk_bytes,
        reader_bytes=never,
        lock_bytes=never,
        decode_share=0.0,  # kernels of two streams do not slow each other down there
        issue_seconds=0.0,
        step_seconds=0.0,
    )
    engine = engine_seconds(tiny_models, rates, kind, resident, held, slots, ring, part)
    model = Sampling(job, machine, steps=len(TIMES), first=True).run()
    assert model == pytest.approx(engine, rel=NEAR)  # the first step, too


def _sizes(models: TinyModels, kind: str) -> dict[str, Any]:
    """Of a block: bytes of each of the groups in which it is decoded, kernels that decode it."""
    store = Rig(models, None).transformer(kind).store
    block = store.blocks[0]
    groups = [block.raw.nbytes] if block.native else [group.end - group.start for group in block.groups]
    return {"groups": groups, "launches": store.decode_cost.launches}
