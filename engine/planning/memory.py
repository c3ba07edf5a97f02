"""Decide where each block lives. Integers in, a MemoryPlan out; imports no torch.

Guarantees: no stage's predicted peak is above its limit; every block lives in one place: on the device, in host memory
or in the file; more memory never makes the forecast slower, but for less than SLOTS_GAIN; what is refused does not fit,
and what the refusal suggests does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..compute.attention_kernels import FUSED
from ..compute.chunk_sizes import MLP_CHUNKS
from ..errors import DoesNotFit
from ..texts import size_text
from .footprint import TransformerFootprint
from .forecast import TYPICAL, Speeds, StepForecast, forecast_step
from .kept import NOTHING_KEPT, KeptTiers, choices
from .overlap import PIECE_BYTES, RING_PIECES
from .request import GIB, Controls, Limits, SamplingRequest
from .run_forecast import RunForecast, forecast_run
from .spread import spread_order

# that a plan may have, the most welcome number first; and pieces of the ring, the smallest first
SLOTS = (2, 3, 1)
RINGS = (RING_PIECES, 6, 8, 12, 16)
# by which another number of slots has to be faster: forecasts do not tell less than that
SLOTS_GAIN = 1.05
# rows of the modulation table kept beyond those of the present run
SPARE_ROWS = 16
# rows on the device: that of the step, and that of the next one
ROWS_ON_DEVICE = 2


@dataclass(frozen=True)
class SecondaryDevice:
    """A further device, on which `blocks` stay: `peak_bytes` of its `limit_bytes` at the worst moment of a step."""

    device: str
    blocks: range
    peak_bytes: int
    limit_bytes: int

    def __repr__(self) -> str:
        return f"blocks {self.blocks.start} to {self.blocks.stop - 1} on {self.device}"


@dataclass(frozen=True)
class MemoryPlan:
    """Where the transformer's blocks live during a run, what that takes, and how long a step and the run will take.

    resident: indices of the blocks that stay on the device. held: of those that stay in host memory; the others are
    read from the file at every step. slots: buffers on the device that blocks pass through (two overlap fetching with
    computing); ring: pieces of host memory, of ring_bytes together, that they pass through before that, and are read
    into ahead.
    mlp_chunk_tokens: None computes the MLP of all tokens at once. attention: by which kernel, and in which chunks. The
    *_peak_bytes are predictions of everything that the stage holds on the device, ram_peak_bytes of everything in host
    memory. `blocks` and all that leave out those of secondaries.

    What torch's caching allocator keeps of the card is more: pieces between those that are used. On the simulated card
    (tests/simulated_gpu/test_reserved.py) that is at most two thirds of activation_bytes above peak_bytes, whatever the
    format: 0.2 to 0.3 GiB at 1024x1024 with guidance. It comes out of the headroom (`free_memory.headroom_bytes`);
    where that is less, torch gives unused segments back to the driver, which takes time.
    """

    request: SamplingRequest
    limits: Limits
    blocks: int
    resident: tuple[int, ...]
    held: tuple[int, ...]
    slots: int
    ring: int
    ring_bytes: int
    mlp_chunk_tokens: int | None
    resident_bytes: int
    activation_bytes: int
    sampling_peak_bytes: int
    modulation_peak_bytes: int
    late_timestep_peak_bytes: int
    ram_peak_bytes: int
    streamed_bytes_per_step: int
    forecast: StepForecast
    run: RunForecast
    attention: str = FUSED.name
    secondaries: tuple[SecondaryDevice, ...] = ()
    kept: KeptTiers = NOTHING_KEPT

    @property
    def limit_bytes(self) -> int:
        """Of device memory."""
        return self.limits.vram_bytes

    @property
    def peak_bytes(self) -> int:
        return max(self.sampling_peak_bytes, self.modulation_peak_bytes, self.late_timestep_peak_bytes)

    @property
    def streamed(self) -> int:
        """How many blocks are fetched per step."""
        return self.blocks - len(self.resident)

    @property
    def from_file(self) -> int:
        """How many of them are read from the file."""
        return self.streamed - len(self.held)

    def __repr__(self) -> str:
        chunk = f", MLP in chunks of {self.mlp_chunk_tokens} tokens" if self.mlp_chunk_tokens else ""
        chunk += f", attention {self.attention}" if self.attention != FUSED.name else ""
        slots = f"{self.slots} slot{'s' if self.slots != 1 else ''}"
        slots += f" and a ring of {self.ring} pieces" if self.ring_bytes and self.from_file else ""
        ram = "" if self.limits.ram_bytes is None else f" of {size_text(self.limits.ram_bytes)}"
        controls = f", {self.request.controls}" if self.request.controls else ""
        kept = f"; {self.kept}" if self.kept.block_bytes else ""
        elsewhere = "".join(f"; {secondary}" for secondary in self.secondaries)
        return (
            f"MemoryPlan({self.request}: {len(self.resident)} of {self.blocks} blocks resident, {len(self.held)} in "
            f"RAM, {self.from_file} read from the file, through {slots}, {size_text(self.streamed_bytes_per_step)} "
            f"per step{chunk}; peak {size_text(self.peak_bytes)} of {size_text(self.limit_bytes)}: weights "
            f"{size_text(self.resident_bytes)}, activations {size_text(self.activation_bytes)}{controls}; RAM "
            f"{size_text(self.ram_peak_bytes)}{ram}; {self.forecast}, {self.run}{kept}{elsewhere})"
        )


def plan_memory(
    footprint: TransformerFootprint,
    request: SamplingRequest,
    limits: Limits,
    speeds: Speeds = TYPICAL,
    secondaries: tuple[SecondaryDevice, ...] = (),
    *,
    slots: Sequence[int] = SLOTS,
    rings: Sequence[int] = RINGS,
) -> MemoryPlan:
    """The fastest plan within the limits with two slots, unless another number of `slots` is faster by SLOTS_GAIN. Of
    equally fast ones that with the smallest of `rings`, then with the most resident blocks, then with the least
    chunking (chunks of MLP_CHUNKS cost next to nothing). The blocks of `secondaries`, at the end of the model, stay on
    other devices.

    Raises DoesNotFit with what would fit.
    """
    footprint = without_secondaries(footprint, secondaries)
    plans = []
    for count, chunk in product(slots, MLP_CHUNKS):
        for ring in rings:
            made = _Draft(footprint, request, count, chunk, ring).plans(limits, speeds)
            plans += made
            if footprint.host or not any(plan.from_file for plan in made):
                break  # nothing passes through a larger one
    if not plans:
        raise _refusal(footprint, request, limits)
    return replace(min(plans, key=_slowness), secondaries=secondaries)


def without_secondaries(
    footprint: TransformerFootprint, secondaries: Sequence[SecondaryDevice]
) -> TransformerFootprint:
    """What is left to the first device."""
    away = sum(len(secondary.blocks) for secondary in secondaries)
    return replace(footprint, blocks=footprint.blocks - away, elsewhere=away)


def _slowness(plan: MemoryPlan) -> tuple[float, int, int, int]:
    wanted_gain = SLOTS_GAIN if plan.streamed and plan.slots != SLOTS[0] else 1.0
    return plan.forecast.seconds * wanted_gain, plan.ring, -len(plan.resident), -plan.kept.on_device


def least_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    """The smallest device limit that `plan_memory` accepts."""
    return min(
        draft.peak_bytes(resident)
        for chunk in MLP_CHUNKS
        for draft in (_Draft(footprint, request, 1, chunk),)
        # few small blocks that are all resident need no staging, and may take less than a slot beside them
        for resident in (0, footprint.blocks)
    )


def least_ram_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    """The smallest limit of host memory that `plan_memory` accepts, if there is memory enough on the device."""
    rows = _rows_bytes(footprint, request)
    return rows + (least_bytes(footprint, request) if footprint.host else footprint.ring_bytes)


def most_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    """The device limit from which on more memory changes nothing: everything resident, and all that is made once."""
    return whole_bytes(footprint, request) + footprint.all_blocks * footprint.kept_block_bytes(request)


def whole_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    """With every block resident, and nothing else kept."""
    return _Draft(footprint, request, 2, None).peak_bytes(footprint.blocks)


def most_ram_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    """The limit of host memory from which on more changes nothing: every block held, and all that they make once."""
    if footprint.host:
        return _rows_bytes(footprint, request) + most_bytes(footprint, request)
    kept = footprint.all_blocks * footprint.kept_block_bytes(request)
    return _rows_bytes(footprint, request) + footprint.ring_bytes + footprint.blocks * footprint.stored_bytes + kept


def step_bytes(footprint: TransformerFootprint, request: SamplingRequest, activation_bytes: int) -> int:
    """What a step holds on the device beside weights and what blocks pass through: rows of the table, and activations,
    or what is kept of them while ControlNets work."""
    controls = request.controls
    widest = max(activation_bytes, footprint.kept_bytes(request) + controls.working_bytes)
    rows = 0 if footprint.host else ROWS_ON_DEVICE * footprint.row_bytes  # the host's are used where they lie
    return rows + controls.held_bytes + widest


@dataclass(frozen=True)
class _Draft:
    """A plan but for where the blocks live."""

    footprint: TransformerFootprint
    request: SamplingRequest
    slots: int
    chunk: int | None
    ring: int = RING_PIECES
    kept: KeptTiers = NOTHING_KEPT

    @property
    def piece_bytes(self) -> int:
        """Of the ring."""
        return min(PIECE_BYTES, self.footprint.stored_bytes)

    @property
    def ring_bytes(self) -> int:
        """Of host memory; with the modulation's, which is of the least size."""
        more = (self.ring - RING_PIECES) * self.piece_bytes
        return 0 if self.footprint.host else self.footprint.ring_bytes + more

    def plans(self, limits: Limits, speeds: Speeds) -> list[MemoryPlan]:
        """One for each way to keep what blocks make once that fits; none where not even a stream does."""
        made = []
        for kept in self._ways_to_keep(limits):
            draft = replace(self, kept=kept)
            resident = draft.most_resident(limits)
            if resident is not None:
                made.append(draft.plan(resident, limits, speeds))
        return made

    def _ways_to_keep(self, limits: Limits) -> Iterable[KeptTiers]:
        footprint, request = self.footprint, self.request
        on_device = self._device_limit(limits) - min(self.peak_bytes(0), self.peak_bytes(footprint.blocks))
        in_host = None if footprint.host else self._ram_left(limits)
        return choices(footprint.all_blocks, footprint.kept_block_bytes(request), on_device, in_host)

    def most_resident(self, limits: Limits) -> int | None:
        """How many blocks can stay on the device; None where not even a stream fits."""
        if self._ram_left(limits) < 0:
            return None
        limit = self._device_limit(limits)
        if self.peak_bytes(self.footprint.blocks) <= limit:
            return self.footprint.blocks
        spare = limit - self.peak_bytes(0)
        if spare < 0:
            return None
        return min(spare // self.footprint.resident_block_bytes, self.footprint.blocks - 1)

    def peak_bytes(self, resident: int) -> int:
        return max(self._peaks(resident))

    def _peaks(self, resident: int) -> tuple[int, int, int]:
        """Of sampling, of the pass that computes the modulation table, and of one late timestep beside the slots."""
        footprint, controls = self.footprint, self.request.controls
        stays = footprint.outside_bytes + resident * footprint.resident_block_bytes + controls.weights_bytes
        stays += self.kept.device_bytes
        staging = 0 if resident == footprint.blocks else footprint.staging_bytes
        modulation = footprint.modulation_slot_bytes
        decoding = footprint.modulation_staging_bytes + footprint.modulation_scratch_bytes
        run = stays + self._slots(resident) * footprint.slot_bytes + staging + footprint.scratch_bytes
        kept = controls.held_bytes + footprint.kept_bytes(self.request)
        return (
            run + step_bytes(footprint, self.request, footprint.activation_bytes(self.request, self.chunk)),
            stays + footprint.modulation_slots_bytes + decoding + footprint.row_bytes,
            run + kept + modulation + decoding + footprint.row_bytes,
        )

    def _slots(self, resident: int) -> int:
        return 0 if resident == self.footprint.blocks and self.footprint.native else self.slots

    def plan(self, resident: int, limits: Limits, speeds: Speeds) -> MemoryPlan:
        footprint, request = self.footprint, self.request
        streamed = footprint.blocks - resident
        left = self._ram_left(limits) - self.kept.host_bytes
        held = 0 if footprint.host else min(streamed, left // footprint.stored_bytes)
        order = spread_order(footprint.blocks)
        sampling, modulation, late = self._peaks(resident)
        host_bytes, kept = self.ring_bytes, self.kept
        if footprint.host:
            host_bytes = self.peak_bytes(resident)
        else:
            spare = left - held * footprint.stored_bytes
            kept = replace(kept, spare_bytes=max(0, min(kept.on_device * kept.block_bytes, spare)))
            host_bytes += kept.host_bytes
        slots = self._slots(resident)
        step = forecast_step(
            footprint,
            request,
            speeds,
            streamed=streamed,
            from_file=streamed - held,
            slots=slots,
            ring_pieces=self.ring,
            piece_bytes=self.piece_bytes,
            kept=kept,
        )
        run = forecast_run(
            footprint,
            request,
            speeds,
            step,
            streamed=streamed,
            slots=slots,
            ring_pieces=self.ring,
            piece_bytes=self.piece_bytes,
        )
        return MemoryPlan(
            request=request,
            limits=limits,
            blocks=footprint.blocks,
            resident=tuple(sorted(order[:resident])),
            held=tuple(sorted(order[resident : resident + held])),
            slots=slots,
            ring=self.ring,
            ring_bytes=self.ring_bytes,
            mlp_chunk_tokens=self.chunk,
            resident_bytes=footprint.outside_bytes + resident * footprint.resident_block_bytes,
            activation_bytes=footprint.activation_bytes(request, self.chunk),
            sampling_peak_bytes=sampling,
            modulation_peak_bytes=modulation,
            late_timestep_peak_bytes=late,
            ram_peak_bytes=_rows_bytes(footprint, request) + host_bytes + held * footprint.stored_bytes,
            streamed_bytes_per_step=streamed * footprint.stored_bytes,
            forecast=step,
            run=run,
            attention=footprint.attention_text(request),
            kept=kept,
        )

    def _ram_left(self, limits: Limits) -> int:
        """What is left of host memory for held blocks; where the device is the host, for everything on the device."""
        if limits.ram_bytes is None:
            return most_ram_bytes(self.footprint, self.request)
        return limits.ram_bytes - _rows_bytes(self.footprint, self.request) - self.ring_bytes

    def _device_limit(self, limits: Limits) -> int:
        if self.footprint.host and limits.ram_bytes is not None:
            return min(limits.vram_bytes, self._ram_left(limits))
        return limits.vram_bytes


def _rows_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    return (request.timesteps + SPARE_ROWS) * footprint.row_bytes


def _refusal(footprint: TransformerFootprint, request: SamplingRequest, limits: Limits) -> DoesNotFit:
    need, need_ram = least_bytes(footprint, request), least_ram_bytes(footprint, request)
    short_of_ram = limits.ram_bytes is not None and need_ram > limits.ram_bytes
    ways, beside = [], ""
    if request.controls:
        beside = f", {request.controls} of it"
        if _fits(footprint, replace(request, controls=Controls()), limits):
            ways.append("no ControlNet and no model patch")
    fewer = next(
        (n for n in range(request.branches - 1, 0, -1) if _fits(footprint, request.with_branches(n), limits)), None
    )
    if fewer is not None:
        ways.append(f"a smaller batch or no guidance ({fewer} instead of {request.branches} branches)")
    for width, height in footprint.suggested_sizes:
        smaller = request.with_size(width, height)
        if width * height < request.width * request.height and _fits(footprint, smaller, limits):
            ways.append(f"{width}x{height} ({size_text(least_bytes(footprint, smaller))})")
            break
    raised = []
    if need > limits.vram_bytes:
        raised.append(f"a VRAM limit of {need / GIB + 0.01:.2f} GB or more")
    if short_of_ram:
        raised.append(f"a RAM limit of {need_ram / GIB + 0.01:.2f} GB or more")
    ways.append(" and ".join(raised))
    if not short_of_ram:
        return DoesNotFit(
            "Sampling needs {need_bytes} at least{beside}, the limit is {limit_bytes} ({request}).\nUse {ways}.",
            code="plan.sampling_does_not_fit",
            need_bytes=need,
            beside=beside,
            limit_bytes=limits.vram_bytes,
            request=request,
            ways=", or ".join(ways),
        )
    return DoesNotFit(
        "Sampling needs {need_bytes} and {need_ram_bytes} of RAM at least{beside}, the limit is {limit_bytes} and "
        "{limit_ram_bytes} of RAM ({request}).\nUse {ways}.",
        code="plan.sampling_does_not_fit_in_ram",
        need_bytes=need,
        need_ram_bytes=need_ram,
        beside=beside,
        limit_bytes=limits.vram_bytes,
        limit_ram_bytes=limits.ram_bytes,
        request=request,
        ways=", or ".join(ways),
    )


def _fits(footprint: TransformerFootprint, request: SamplingRequest, limits: Limits) -> bool:
    enough_ram = limits.ram_bytes is None or least_ram_bytes(footprint, request) <= limits.ram_bytes
    return enough_ram and least_bytes(footprint, request) <= limits.vram_bytes
