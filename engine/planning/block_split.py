"""Divide a transformer's blocks among devices. Integers in, counts out; imports no torch."""

from collections.abc import Sequence
from dataclasses import replace

from .draft import most_bytes, whole_bytes
from .footprint import TransformerFootprint
from .memory import without_secondaries
from .memory_plan import SecondaryDevice
from .request import Controls, SamplingRequest


def share_out_blocks(
    footprint: TransformerFootprint, request: SamplingRequest, first_limit_bytes: int, others: Sequence[tuple[str, int]]
) -> tuple[SecondaryDevice, ...]:
    """What further devices, (name, limit in bytes) each, take from the end of the model.

    Each holds as many blocks as fit all at once, and none where the first device has room for what is left: handing
    activations on costs less than fetching a block, but it costs. At least one block stays with the first device.
    """
    secondaries: list[SecondaryDevice] = []
    left = footprint.blocks
    for device, limit in others:
        if most_bytes(without_secondaries(footprint, secondaries), request) <= first_limit_bytes:
            break
        count = max((n for n in range(left) if n and secondary_bytes(footprint, request, n) <= limit), default=0)
        if count:
            secondaries.append(
                SecondaryDevice(device, range(left - count, left), secondary_bytes(footprint, request, count), limit)
            )
            left -= count
    return tuple(secondaries)


def secondary_bytes(footprint: TransformerFootprint, request: SamplingRequest, blocks: int) -> int:
    """What a device takes on which so many blocks stay, and nothing else of the model or beside it."""
    away = footprint.blocks - blocks
    there = replace(footprint, blocks=blocks, elsewhere=away, outside_bytes=0)
    return whole_bytes(there, replace(request, controls=Controls()))
