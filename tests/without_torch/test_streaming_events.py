"""The forecast of a step, block by block, is what a discrete-event model says of its pieces, copies and kernels."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product

import pytest
from qwenimage_lowvram.engine.models.qwen_image.costs import QwenImageFootprint
from qwenimage_lowvram.engine.planning.forecast import Speeds, forecast_step
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.overlap import Way, ways
from qwenimage_lowvram.engine.planning.request import GIB, Limits, SamplingRequest
from streaming_events import Job, Keeping, Machine, first_seconds, job_of, machine_of, step_seconds

from .test_plan import REAL, REAL_INT8

MIB = 1024**2
# decode_bytes and decode_launches as tests/engine/test_decode_costs.py has them counted
FOOTPRINTS = {
    "bf16": REAL,
    "int8": REAL_INT8,
    "nf4": replace(
        REAL,
        stored_bytes=127_513_600,
        staging_bytes=21_240_000,
        native=False,
        decode_bytes=1_487_000_000,
        decode_launches=448,
    ),
}
REQUESTS = {
    "1328 guided": SamplingRequest(1328, 1328, 2, 512),
    "1024 guided": SamplingRequest(1024, 1024, 2, 512),
    "1328 Lightning": SamplingRequest(1328, 1328, 1, 512, timesteps=8),
    "1024 Lightning": SamplingRequest(1024, 1024, 1, 512, timesteps=8),
    "512 Lightning": SamplingRequest(512, 512, 1, 512, timesteps=4),
}
# RAM in GiB that may be held (None: for everything), bytes per second from the disk
FROM = {"RAM": (None, 3.5e9), "NVMe 3.5": (2, 3.5e9), "NVMe 7": (2, 7e9), "half": (10, 3.5e9), "SATA": (4, 0.5e9)}
MACHINES = [(25e12, 24e9), (60e12, 24e9), (25e12, 12e9), (40e12, 12e9), (60e12, 12e9)]  # FLOP/s, bytes/s of the bus
NEAR = 0.10


def cases() -> Iterator[tuple[QwenImageFootprint, SamplingRequest, Limits, Speeds]]:
    for footprint, request, where, (flops, bus) in product(FOOTPRINTS.values(), REQUESTS.values(), FROM, MACHINES):
        ram, disk = FROM[where]
        limits = Limits(round(3.5 * GIB), None if ram is None else ram * GIB)
        yield footprint, request, limits, Speeds(flops, bus, disk)


@pytest.mark.slow
def test_forecasts_are_within_a_tenth_of_the_model() -> None:
    far = []
    for footprint, request, limits, speeds in islice(cases(), 0, None, 2):  # of every machine, which are an odd number
        plan = plan_memory(footprint, request, limits, speeds)
        job, machine = job_of(footprint, plan, speeds), machine_of(speeds)
        first = forecast_step(
            footprint,
            request,
            speeds,
            streamed=plan.streamed,
            from_file=plan.from_file,
            slots=plan.slots,
            ring_pieces=job.ring_pieces,
            piece_bytes=job.piece_bytes,
            first=True,
        )
        for name, forecast, model in (
            ("step", plan.forecast.seconds, step_seconds(job, machine, steps=4)),
            ("first step", first.seconds, first_seconds(job, machine)),
        ):
            if abs(forecast / model - 1) > NEAR:
                far.append(f"{name}: {forecast:.2f} s, the model {model:.2f} s: {plan!r} {speeds}")
    assert not far


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("ring", [4, 8, 16])
@pytest.mark.parametrize("held", [0, 30, 45, 60])
def test_what_slots_and_the_ring_lose_is_in_the_forecast(slots: int, ring: int, held: int) -> None:
    speeds = Speeds(40e12, 12e9, 3.5e9)
    for footprint, request in product(FOOTPRINTS.values(), (REQUESTS["1024 Lightning"], REQUESTS["1328 guided"])):
        plan = plan_memory(footprint, request, Limits(round(3.5 * GIB)), speeds)
        from_file = plan.streamed - min(held, plan.streamed)
        job = replace(
            job_of(footprint, plan, speeds),
            ways=ways(footprint.blocks, streamed=plan.streamed, from_file=from_file),
            slots=slots,
            ring_pieces=ring,
        )
        forecast = forecast_step(
            footprint,
            request,
            speeds,
            streamed=plan.streamed,
            from_file=from_file,
            slots=slots,
            ring_pieces=ring,
            piece_bytes=job.piece_bytes,
        )
        assert forecast.seconds == pytest.approx(step_seconds(job, machine_of(speeds), steps=4), rel=NEAR)


FAST = Machine(1e18, 1e18, 1e18, 1e18, decode_share=0.0, issue_seconds=0.0, step_seconds=0.0)
JOB = Job((Way.HELD,) * 10, (1000,), 0.0, 1.0, branches=1, slots=2, ring_pieces=4, piece_bytes=250)
STAYING = replace(JOB, ways=(Way.STAYS,) * 10)


@pytest.mark.parametrize(
    ("job", "machine", "seconds"),
    [
        (JOB, FAST, 10.0),
        (JOB, replace(FAST, step_seconds=0.5), 10.5),
        (replace(JOB, link_seconds=1.5), FAST, 25.0),
        (replace(JOB, link_seconds=1.5), replace(FAST, bus_bytes=500.0), 25.0),  # copies go on meanwhile
        (JOB, replace(FAST, issue_seconds=3.0), 30.0),
        (JOB, replace(FAST, bus_bytes=500.0), 20.0),
        (replace(JOB, slots=1), replace(FAST, bus_bytes=500.0), 30.0),
        (replace(JOB, decode_seconds=0.5), replace(FAST, decode_share=0.5), 12.5),
        (replace(JOB, decode_seconds=3.0), FAST, 30.0),
        (replace(JOB, ways=(Way.STAYS,) * 10), replace(FAST, bus_bytes=1.0, disk_bytes=1.0), 10.0),
        (replace(JOB, ways=(Way.STAYS,) * 10, decode_seconds=3.0), replace(FAST, bus_bytes=1.0), 30.0),
        (replace(JOB, ways=(Way.READ,) * 10), replace(FAST, disk_bytes=500.0), 20.0),
        # one thread reads a piece in a second: with four there is a block in a second
        (replace(JOB, ways=(Way.READ,) * 10, compute_seconds=0.5), replace(FAST, reader_bytes=250.0), 10.0),
        (replace(JOB, ways=(Way.READ,) * 10, ring_pieces=2), replace(FAST, reader_bytes=250.0), 20.0),
        (replace(JOB, keeping=Keeping(make_seconds=1.0, remade=4)), FAST, 14.0),
        # the first block's is brought when it is asked for
        (replace(STAYING, keeping=Keeping(nbytes=500, host=tuple(range(10)))), replace(FAST, bus_bytes=500.0), 11.0),
        (
            replace(STAYING, keeping=Keeping(nbytes=500, host=tuple(range(10)), ahead=False)),
            replace(FAST, bus_bytes=500.0),
            20.0,
        ),
    ],
)
def test_the_model_by_hand(job: Job, machine: Machine, seconds: float) -> None:
    assert step_seconds(job, machine) == pytest.approx(seconds, rel=0.01)


def test_a_first_step_locks_and_reads_what_is_to_be_held() -> None:
    machine = replace(FAST, disk_bytes=500.0)
    assert first_seconds(JOB, machine) == pytest.approx(10 * 2 + 1)
    assert first_seconds(JOB, replace(machine, lock_bytes=250.0)) == pytest.approx(10 * 4 + 2 + 1)
    assert step_seconds(JOB, replace(machine, lock_bytes=250.0)) == pytest.approx(10)


def test_a_first_step_makes_what_is_kept() -> None:
    keeping = Keeping(make_seconds=0.5, nbytes=500, host=(9,))
    assert first_seconds(replace(JOB, keeping=keeping), FAST) == pytest.approx(15)
    assert step_seconds(replace(JOB, keeping=keeping), FAST) == pytest.approx(10)
