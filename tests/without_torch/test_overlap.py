"""How long a pass takes of which the parts hide behind each other."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwenimage_lowvram.engine.planning.overlap import BlockSeconds, pass_seconds

ROOMY = {"ring_blocks": 2.0, "piece_blocks": 0.1}
seconds = st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.7, 4.0])


@pytest.mark.parametrize(
    ("one", "slots", "expected"),
    [
        (BlockSeconds(compute=1.0, copy=0.5, read=0.5), 2, 60.0),
        (BlockSeconds(compute=0.5, copy=1.0, read=0.5), 2, 60.0),
        (BlockSeconds(compute=0.5, copy=0.5, read=1.0), 2, 60.0),
        (BlockSeconds(compute=1.0, copy=0.5, read=0.5), 1, 90.0),  # no copy while the only slot is in use
        (BlockSeconds(compute=1.0, copy=0.5, read=2.0), 1, 120.0),  # reads go on
        (BlockSeconds(compute=1.0, copy=0.2, read=0.5, decode=0.6, lost=0.3), 2, 78.0),
        (BlockSeconds(compute=0.5, copy=0.4, read=0.5, decode=0.6, lost=0.3), 2, 60.0),
        (BlockSeconds(compute=0.5, copy=0.4, read=0.5, decode=0.6, lost=0.3), 1, 90.0),
    ],
)
def test_the_longest_part_hides_the_others(one: BlockSeconds, slots: int, expected: float) -> None:
    assert pass_seconds(60, one, streamed=60, from_file=60, slots=slots, **ROOMY) == pytest.approx(expected, rel=0.02)


def test_reads_that_fall_into_one_half_of_a_pass_are_not_hidden_by_the_other() -> None:
    """Every third block comes from the file and takes three times a block's computing, minus a little."""
    one = BlockSeconds(compute=1.0, copy=0.1, read=2.9)
    near = pass_seconds(60, one, streamed=60, from_file=20, slots=2, ring_blocks=0.0, piece_blocks=0.1)
    far = pass_seconds(60, one, streamed=60, from_file=20, slots=2, ring_blocks=2.0, piece_blocks=0.1)
    assert near > 1.2 * far
    assert far == pytest.approx(60.0, rel=0.05)


def test_encoded_blocks_that_stay_are_decoded_all_the_same() -> None:
    one = BlockSeconds(compute=0.5, copy=9.0, read=9.0, decode=1.0)
    assert pass_seconds(60, one, streamed=0, from_file=0, slots=2, **ROOMY) == pytest.approx(60.0, rel=0.02)


def test_the_first_pass_reads_and_locks_what_is_to_be_held() -> None:
    one = BlockSeconds(compute=0.5, copy=0.1, read=0.7, lock=1.0)
    assert pass_seconds(60, one, streamed=60, from_file=0, slots=2, **ROOMY) == pytest.approx(30.0, rel=0.02)
    first = pass_seconds(60, one, streamed=60, from_file=0, slots=2, first=True, **ROOMY)
    assert first == pytest.approx(60.0, rel=0.03)


@settings(deadline=None)
@given(
    one=st.builds(
        lambda *each: BlockSeconds(*each, lost=min(each[0], each[-1] / 2)), seconds, seconds, seconds, seconds
    ),
    blocks=st.integers(1, 20),
    counts=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    slots=st.integers(1, 3),
    ring=st.sampled_from([0.0, 0.3, 1.0, 1.5, 4.2]),
    more=st.sampled_from(["stays", "held", "slot", "ring"]),
)
def test_more_of_anything_is_never_slower(
    one: BlockSeconds, blocks: int, counts: tuple[int, int], slots: int, ring: float, more: str
) -> None:
    from_file, streamed = sorted(min(blocks, count) for count in counts)

    def took(*, streamed: int, from_file: int, slots: int, ring: float) -> float:
        return pass_seconds(
            blocks,
            one,
            streamed=streamed,
            from_file=from_file,
            slots=slots,
            ring_blocks=ring,
            piece_blocks=0.1,
        )

    before = took(streamed=streamed, from_file=from_file, slots=slots, ring=ring)
    after = took(
        streamed=max(0, streamed - (more == "stays")),
        from_file=max(0, min(from_file - (more == "held"), streamed - (more == "stays"))),
        slots=slots + (more == "slot"),
        ring=ring + 0.7 * (more == "ring"),
    )
    last = one.lost if more == "slot" else 0.0  # with one slot nothing is decoded beside computing
    assert after <= (before + last) * (1 + 1e-12)
