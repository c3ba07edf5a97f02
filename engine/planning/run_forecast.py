"""How long a run of sampling will take, the first one of its weights and one with another seed. Numbers in, numbers
out; imports no torch."""

from dataclasses import dataclass

from .footprint import TransformerFootprint
from .forecast import Speeds, StepForecast, decode_seconds, forecast_step
from .overlap import PIECE_BYTES, RING_PIECES
from .request import SamplingRequest

# kernels of a block's modulation, for one timestep: SiLU and two products
MODULATION_LAUNCHES = 3


@dataclass(frozen=True)
class RunForecast:
    """Seconds of loading what stays on the device, of the timesteps' table, of the first step, which also reads what is
    to be held in host memory, and of each of the others. computed: of `steps`; the others take next to nothing."""

    load_seconds: float
    modulation_seconds: float
    first_step_seconds: float
    step_seconds: float
    steps: int
    computed: int

    @property
    def first_seconds(self) -> float:
        """Of the first run of these weights, nothing of which is in the system's file cache."""
        others = (self.computed - 1) * self.step_seconds
        return self.load_seconds + self.modulation_seconds + self.first_step_seconds + others

    @property
    def again_seconds(self) -> float:
        """Of a run with another seed: what was loaded is there, and the table is known."""
        return self.computed * self.step_seconds

    def __str__(self) -> str:
        steps = f"{self.steps} step{'s' if self.steps != 1 else ''}"
        steps += f", {self.computed} of them computed," if self.computed != self.steps else ""
        return f"{steps} in {self.first_seconds:.0f} s, with another seed in {self.again_seconds:.0f} s"


def forecast_run(
    footprint: TransformerFootprint,
    request: SamplingRequest,
    speeds: Speeds,
    step: StepForecast,
    *,
    streamed: int,
    slots: int,
    ring_pieces: int = RING_PIECES,
    piece_bytes: int = PIECE_BYTES,
) -> RunForecast:
    """Of a run whose steps are forecast to be like `step`."""
    first = forecast_step(
        footprint,
        request,
        speeds,
        streamed=streamed,
        from_file=streamed,
        slots=slots,
        ring_pieces=ring_pieces,
        piece_bytes=piece_bytes,
        first=True,
    )
    return RunForecast(
        load_seconds=load_seconds(footprint, footprint.blocks - streamed, speeds),
        modulation_seconds=_modulation_seconds(footprint, request.timesteps, speeds),
        first_step_seconds=first.seconds,
        step_seconds=step.seconds,
        steps=request.timesteps,
        computed=request.computed_steps,
    )


def load_seconds(footprint: TransformerFootprint, blocks: int, speeds: Speeds) -> float:
    """Of bringing so many blocks from their file to the device, as they are stored."""
    return _moving_seconds(blocks * footprint.stored_bytes, footprint.host, speeds)


def _modulation_seconds(footprint: TransformerFootprint, timesteps: int, speeds: Speeds) -> float:
    """One pass over weights that are read from the device's memory once for each timestep: products with one row."""
    weights = footprint.all_blocks * footprint.modulation_slot_bytes
    if not weights:
        return 0.0
    blocks = footprint.all_blocks
    moving = _moving_seconds(blocks * footprint.modulation_stored_bytes, footprint.host, speeds)
    decoding = decode_seconds(
        blocks * footprint.modulation_decode_bytes, blocks * footprint.modulation_decode_launches, speeds
    )
    computing = decode_seconds(timesteps * weights, timesteps * blocks * MODULATION_LAUNCHES, speeds)
    # both wait for the device's memory
    return max(moving, decoding + computing)


def _moving_seconds(nbytes: int, host: bool, speeds: Speeds) -> float:
    """From the file to the device."""
    return max(nbytes / speeds.disk_bytes, 0.0 if host else nbytes / speeds.bus_bytes)
