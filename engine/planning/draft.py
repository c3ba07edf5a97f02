"""What a plan of given slots, chunks and ring takes, whatever stays where; and the least and the most that any takes.
Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .footprint import TransformerFootprint
from .forecast import Speeds, forecast_step
from .kept import NOTHING_KEPT, KeptTiers, choices
from .memory_plan import MemoryPlan
from .overlap import PIECE_BYTES, RING_PIECES
from .request import Limits, SamplingRequest
from .run_forecast import forecast_run
from .spread import spread_order

# rows of the modulation table kept beyond those of the present run
SPARE_ROWS = 16
# rows on the device: that of the step, and that of the next one
ROWS_ON_DEVICE = 2
# of a row, where tokens that are not denoised have one of their own
MODULATION_TOKENS = 2


def least_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    """The smallest device limit that `plan_memory` accepts."""
    return min(
        draft.peak_bytes(resident)
        for chunk in footprint.mlp_chunks
        for draft in (Draft(footprint, request, 1, chunk),)
        # few small blocks that are all resident need no staging, and may take less than a slot beside them
        for resident in (0, footprint.blocks)
    )


def least_ram_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    """The smallest limit of host memory that `plan_memory` accepts, if there is memory enough on the device."""
    rows = rows_bytes(footprint, request)
    return rows + (least_bytes(footprint, request) if footprint.host else footprint.ring_bytes)


def most_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    """The device limit from which on more memory changes nothing: everything resident, and all that is made once."""
    return whole_bytes(footprint, request) + footprint.all_blocks * footprint.kept_block_bytes(request)


def whole_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    """With every block resident, and nothing else kept."""
    return Draft(footprint, request, 2, None).peak_bytes(footprint.blocks)


def most_ram_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    """The limit of host memory from which on more changes nothing: every block held, and all that they make once."""
    if footprint.host:
        return rows_bytes(footprint, request) + most_bytes(footprint, request)
    kept = footprint.all_blocks * footprint.kept_block_bytes(request)
    return rows_bytes(footprint, request) + footprint.ring_bytes + footprint.blocks * footprint.stored_bytes + kept


def step_bytes(footprint: TransformerFootprint, request: SamplingRequest, activation_bytes: int) -> int:
    """What a step holds on the device beside weights and what blocks pass through: rows of the table, and activations,
    or what is kept of them while ControlNets work."""
    controls = request.controls
    widest = max(activation_bytes, _kept_bytes(footprint, request) + controls.working_bytes)
    rows = 0 if footprint.host else ROWS_ON_DEVICE * footprint.row_bytes  # the host's are used where they lie
    return rows + controls.held_bytes + widest


def _activation_bytes(footprint: TransformerFootprint, request: SamplingRequest, chunk: int | None) -> int:
    return footprint.activation_bytes(request, chunk) + footprint.anchors_bytes(request)


def _kept_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    """Of these, what stays on the device from one pass to the next."""
    return footprint.kept_bytes(request) + footprint.anchors_bytes(request)


@dataclass(frozen=True)
class Draft:
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
        decoding += footprint.modulation_linear.scratch_bytes(MODULATION_TOKENS)
        run = stays + self._slots(resident) * footprint.slot_bytes + staging + footprint.scratch_bytes
        kept = controls.held_bytes + _kept_bytes(footprint, self.request)
        return (
            run + step_bytes(footprint, self.request, _activation_bytes(footprint, self.request, self.chunk)),
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
            activation_bytes=_activation_bytes(footprint, request, self.chunk),
            sampling_peak_bytes=sampling,
            modulation_peak_bytes=modulation,
            late_timestep_peak_bytes=late,
            ram_peak_bytes=rows_bytes(footprint, request) + host_bytes + held * footprint.stored_bytes,
            streamed_bytes_per_step=streamed * footprint.stored_bytes,
            forecast=step,
            run=run,
            attention=footprint.attention_text(request),
            kept=kept,
            in_half=footprint.in_half,
            linear=footprint.linear.text,
            compiled=footprint.compiled,
        )

    def _ram_left(self, limits: Limits) -> int:
        """What is left of host memory for held blocks; where the device is the host, for everything on the device."""
        if limits.ram_bytes is None:
            return most_ram_bytes(self.footprint, self.request)
        return limits.ram_bytes - rows_bytes(self.footprint, self.request) - self.ring_bytes

    def _device_limit(self, limits: Limits) -> int:
        if self.footprint.host and limits.ram_bytes is not None:
            return min(limits.vram_bytes, self._ram_left(limits))
        return limits.vram_bytes


def rows_bytes(footprint: TransformerFootprint, request: SamplingRequest) -> int:
    return (request.timesteps + SPARE_ROWS) * footprint.row_bytes
