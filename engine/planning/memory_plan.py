"""A plan as a value: where each block lives during a run, and what that takes. Imports no torch."""

from dataclasses import dataclass

from ..compute.attention_kernels import FUSED
from ..texts import size_text
from .forecast import StepForecast
from .kept import NOTHING_KEPT, KeptTiers
from .request import Limits, SamplingRequest
from .run_forecast import RunForecast


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
class BranchDevice:
    """A further device, which computes branches of its own on blocks that the first one's reader brings to both: `plan`
    is its own, whose request has its branches."""

    device: str
    plan: "MemoryPlan"

    @property
    def peak_bytes(self) -> int:
        return self.plan.peak_bytes

    @property
    def limit_bytes(self) -> int:
        return self.plan.limit_bytes

    def __repr__(self) -> str:
        plan = self.plan
        branches = f"{plan.request.branches} branch{'es' if plan.request.branches != 1 else ''}"
        return (
            f"{branches} on {self.device}: {len(plan.resident)} of {plan.blocks} blocks resident, peak "
            f"{size_text(plan.peak_bytes)} of {size_text(plan.limit_bytes)}"
        )


@dataclass(frozen=True)
class MemoryPlan:
    """Where the transformer's blocks live during a run, what that takes, and how long a step and the run will take.

    resident: indices of the blocks that stay on the device. held: of those that stay in host memory; the others are
    read from the file at every step. slots: buffers on the device that blocks pass through (two overlap fetching with
    computing); ring: pieces of host memory, of ring_bytes together, that they pass through before that, and are read
    into ahead.
    mlp_chunk_tokens: None computes the MLP of all tokens at once. attention: by which kernel, and in which chunks.
    linear: numbers that linear layers multiply as they are stored, and by what; empty where all are decoded. in_half:
    products are in fp16, and activations in fp32. compiled: whether blocks that are compiled compute the same bits
    (exact, not exact); empty where none are. The *_peak_bytes are predictions of everything that the
    stage holds on the device, ram_peak_bytes of everything in host memory. `blocks` and all that leave out those of
    secondaries. beside: devices that compute other branches at the same time; what is said here is then of the first
    device and its own ones, but for the forecasts, which are of all together.

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
    in_half: bool = False
    linear: str = ""
    compiled: str = ""
    beside: tuple[BranchDevice, ...] = ()

    @property
    def further(self) -> tuple["SecondaryDevice | BranchDevice", ...]:
        """The devices that compute beside the first one, or behind it."""
        return (*self.secondaries, *self.beside)

    @property
    def whole_request(self) -> SamplingRequest:
        """Of all devices together."""
        return self.request.with_those_beside()

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

    @property
    def computing(self) -> tuple[str, ...]:
        """What a person is told of products and blocks that are not computed as decoded weights in one dtype are."""
        return (
            *(["products in fp16 between activations in fp32"] if self.in_half else []),
            *([f"linear layers in {self.linear} (not exact)"] if self.linear else []),
            *([f"blocks compiled ({self.compiled})"] if self.compiled else []),
        )

    def __repr__(self) -> str:
        chunk = f", MLP in chunks of {self.mlp_chunk_tokens} tokens" if self.mlp_chunk_tokens else ""
        chunk += f", attention {self.attention}" if self.attention != FUSED.name else ""
        chunk += "".join(f", {text}" for text in self.computing)
        slots = f"{self.slots} slot{'s' if self.slots != 1 else ''}"
        slots += f" and a ring of {self.ring} pieces" if self.ring_bytes and self.from_file else ""
        ram = "" if self.limits.ram_bytes is None else f" of {size_text(self.limits.ram_bytes)}"
        controls = f", {self.request.controls}" if self.request.controls else ""
        kept = f"; {self.kept}" if self.kept.block_bytes else ""
        elsewhere = "".join(f"; {other}" for other in self.further)
        elsewhere += f"; not exact: {self.request.step_cache}" if self.request.step_cache else ""
        return (
            f"Memory plan for {self.request}: {len(self.resident)} of {self.blocks} blocks resident, "
            f"{len(self.held)} in RAM, {self.from_file} read from the file, through {slots}, "
            f"{size_text(self.streamed_bytes_per_step)} per step{chunk}; peak {size_text(self.peak_bytes)} of "
            f"{size_text(self.limit_bytes)}: weights {size_text(self.resident_bytes)}, activations "
            f"{size_text(self.activation_bytes)}{controls}; RAM {size_text(self.ram_peak_bytes)}{ram}; "
            f"{self.forecast}, {self.run}{kept}{elsewhere}"
        )
