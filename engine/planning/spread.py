"""Which blocks stay nearest to the device, where not all do. Integers in, indices out; imports no torch."""

from functools import cache


@cache
def spread_order(blocks: int) -> tuple[int, ...]:
    """All indices in an order of which every beginning is spread evenly: each fetch has computing to hide behind, and
    one block more or less on the device moves no other.

    Multiples of the golden ratio modulo 1: new points fall into the largest gaps.
    """
    golden, order = (5**0.5 - 1) / 2, dict.fromkeys([0])
    step = 0
    while len(order) < blocks:
        step += 1
        order[int(step * golden % 1 * blocks)] = None
    return tuple(order)[:blocks]
