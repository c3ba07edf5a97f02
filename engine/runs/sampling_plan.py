"""The plan of a sampling run, within what a person and the machine allow. Refuses before anything is loaded."""

from contextlib import nullcontext
from typing import Any

import torch

from ..models.streamed_transformer import StreamedTransformer
from ..planning.block_split import secondary_bytes
from ..planning.branch_split import Card
from ..planning.draft import least_bytes, least_ram_bytes, most_bytes, most_ram_bytes
from ..planning.memory_plan import MemoryPlan
from ..planning.request import Limits, SamplingRequest
from ..planning.several_cards import plan_on_cards
from .free_memory import check_room
from .known_speeds import KnownSpeeds
from .limit import Limit
from .surroundings import Surroundings

Transformer = StreamedTransformer[Any, Any]


def plan_sampling(
    transformer: Transformer,
    request: SamplingRequest,
    limit: Limit,
    ram_limit_bytes: int | None,
    speeds: KnownSpeeds,
    surroundings: Surroundings,
    *,
    one_by_one: bool = False,
) -> MemoryPlan:
    """Where each block is to live, and which of the model's devices computes what. A limit of None: what is free.
    `one_by_one`: branches may not be computed at the same time. Raises DoesNotFit before anything is loaded."""
    footprint, hardware = transformer.footprint, transformer.hardware
    steps = request.timesteps
    check_room(steps * footprint.row_bytes, f"The modulation of {steps} steps", "Use fewer steps.")
    vram = surroundings.device_bytes(
        hardware.device, limit.nbytes, most_bytes(footprint, request), footprint.slot_bytes
    )
    if footprint.compiled and vram < least_bytes(footprint, request):
        assert transformer.compiled is not None
        transformer.compiled.give_up("within this limit MLPs are computed in chunks")
        footprint = transformer.footprint
    ram: int | None = ram_limit_bytes  # where the device is the host, what is free there is counted already
    if not footprint.host:
        least = least_ram_bytes(footprint, request)
        wanted = least if hardware.unified else most_ram_bytes(footprint, request)
        ram = surroundings.host_bytes(transformer, ram_limit_bytes, wanted, least)
        if hardware.unified:  # the device's memory is the host's too: what is free must not be given out twice
            ram = min(ram, least)
    budgets = _other_budgets(transformer, request, limit, surroundings)
    others = [Card(name, nbytes, speeds.on(name)) for name, nbytes in budgets]
    # RAM is short only where a limit is set, and the message names that
    enough = vram >= least_bytes(footprint, request)
    with nullcontext() if enough else limit.naming(hardware.device, vram):
        return plan_on_cards(footprint, request, Limits(vram, ram), speeds.get(), others, one_by_one=one_by_one)


def _other_budgets(
    transformer: Transformer, request: SamplingRequest, limit: Limit, surroundings: Surroundings
) -> list[tuple[str, int]]:
    """What may be held on each of the model's further devices."""
    wanted = secondary_bytes(transformer.footprint, request, transformer.footprint.blocks)
    budgets, slot_bytes = [], transformer.footprint.slot_bytes
    for name, store in transformer.secondaries.items():
        held = store.resident_bytes  # nobody else knows of it: what is called free is beside it
        free = surroundings.device_bytes(torch.device(name), limit.nbytes, wanted - held, slot_bytes) + held
        budgets.append((name, free if limit.nbytes is None else min(free, limit.nbytes)))
    return budgets
