"""What slots and the ring lose: nothing where they suffice, and what arithmetic by hand says where they do not."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwenimage_lowvram.engine.planning.overlap import RING_PIECES, RINGS, Passage

MIB = 1024**2
BF16 = Passage(60, 60, 60, 30, block_bytes=453_093_376, slots=2, piece_bytes=32 * MIB)

counts = st.integers(0, 60)
passages = st.builds(
    Passage,
    blocks=st.just(60),
    passing=counts,
    streamed=counts,
    from_file=counts,
    block_bytes=st.integers(1, 500).map(lambda n: n * MIB),
    slots=st.integers(1, 3),
    ring=st.sampled_from(RINGS),
    piece_bytes=st.sampled_from([0, 8 * MIB, 32 * MIB]),
).filter(lambda way: way.passing >= way.streamed >= way.from_file)
rates = st.sampled_from([5e8, 3.5e9, 7e9, 12e9, 25e9])


@pytest.mark.parametrize(("ring", "seconds"), [(4, 30 * (129.455 - 38.348 - 70) / 1e3), (12, 0.0), (16, 0.0)])
def test_blocks_from_the_file_between_blocks_from_ram_are_read_ahead_as_far_as_the_ring_goes(
    ring: int, seconds: float
) -> None:
    """Half of bf16 from a disk of 3.5 GB/s: a block is read in 129 ms, computing one takes 70, four pieces take 38."""
    way = replace(BF16, ring=ring)
    stalled = way.stalled_seconds(compute_seconds=60 * 0.070, bus_bytes=24e9, disk_bytes=3.5e9)
    assert stalled == pytest.approx(seconds, abs=1e-4)


def test_one_slot_hides_copies_behind_nothing_but_what_stays() -> None:
    from_ram = replace(BF16, from_file=0, slots=1)
    assert from_ram.stalled_seconds(compute_seconds=6.0, bus_bytes=12e9, disk_bytes=1e9) == pytest.approx(
        60 * BF16.block_bytes / 12e9
    )
    half = replace(from_ram, passing=30, streamed=30)
    assert half.stalled_seconds(compute_seconds=6.0, bus_bytes=12e9, disk_bytes=1e9) == 0


def test_a_ring_of_the_least_size_takes_less_from_a_disk_that_is_about_as_fast_as_the_bus() -> None:
    rates = [replace(BF16, ring=ring).disk_bytes(disk_bytes=7e9, bus_bytes=12e9) for ring in RINGS]
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(7e9 * 4 / (4 + 7 / 12))
    assert rates[1] == 7e9


@given(way=passages, rates=st.tuples(rates, rates), compute=st.sampled_from([0.0, 0.5, 3.0, 30.0]))
def test_more_of_anything_never_stalls_longer(way: Passage, rates: tuple[float, float], compute: float) -> None:
    def stalled(other: Passage) -> float:
        return other.stalled_seconds(compute_seconds=compute, bus_bytes=rates[0], disk_bytes=rates[1])

    least = stalled(way) + 1e-9
    assert stalled(replace(way, slots=way.slots + 1)) <= least
    assert all(stalled(replace(way, ring=ring)) <= least for ring in RINGS if ring >= way.ring)
    if way.from_file:
        assert stalled(replace(way, from_file=way.from_file - 1)) <= least
        if way.streamed == way.passing:
            fewer = way.streamed - 1
            assert stalled(replace(way, passing=fewer, streamed=fewer, from_file=way.from_file - 1)) <= least
    assert RING_PIECES == min(RINGS)
