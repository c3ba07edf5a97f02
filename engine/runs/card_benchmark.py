"""Measure what a machine does with a model, or with one block of its size where there is no file: rates, a block, a
short run. Leaves nothing on the device, and remembers nothing for later runs."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..compute.linear_choice import Computing, linear_of
from ..errors import DoesNotFit
from ..files.checkpoint import Checkpoint
from ..hardware import Hardware
from ..models.family import FromPrompts
from ..models.qwen_image.family import QWEN_IMAGE
from ..models.transformer_session import Part, Seat, TransformerSession
from ..planning.forecast import TYPICAL, Speeds
from ..planning.memory_plan import MemoryPlan
from ..planning.request import SamplingRequest
from ..reports.card_report import BlockVisit, CardReport, Rates
from ..streaming import BlockStreamer, StreamOrder
from ..streaming.block_layout import FORMAT_OF_DTYPE
from .free_memory import check_room
from .known_speeds import KnownSpeeds
from .limit import Limit
from .machine_speeds import MEASURING_BYTES, measure_bus, measure_disk, measure_flops, measure_memory
from .pass_clock import PassClock
from .phases import Phase, PhaseProgress
from .random_block import REAL, BlockSize, Stored, random_block, random_block_bytes
from .sample import EulerSampler
from .sampling_plan import Transformer, plan_sampling
from .surroundings import Surroundings
from .timeline import Timeline

STEPS = 2  # of the short run: the first one is like no other
PROMPT_TOKENS = 300
BLOCK_SECONDS = 0.5  # of visits of a block, at the least
# of the random block and its image where the device is the host, on which real ones take minutes
HOST_BLOCK, HOST_SIDES = BlockSize(heads=8), (256, 128)
SMALLER_BLOCK, SMALLER_PRODUCTS = (
    f"smaller {what}, as this is a CPU" for what in ("block, image and products", "products measured for the TFLOP/s")
)
NO_INT8 = "int8 not computed as stored here"

T = TypeVar("T")


@dataclass(frozen=True)
class Bench:
    """Where it is measured: the program around, the limits that a person set, and what is told of the machine."""

    surroundings: Surroundings
    limit: Limit = field(default_factory=Limit)
    ram_limit_bytes: int | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)


def benchmark_model(
    transformer: Transformer, images: FromPrompts, bench: Bench, *, width: int, height: int
) -> CardReport:
    """With the model's own file: the disk that it lies on, one of its blocks, and STEPS steps without guidance of one
    image of that many px.

    Raises InvalidRequest for a size that cannot be made, DoesNotFit before anything is measured, DamagedFile and
    MissingFile, and what `surroundings.check` raises.
    """
    inputs = _Inputs.of(transformer, images, width, height)
    prompts, noise = [inputs.prompt], inputs.noise
    parts = _Parts(bench.surroundings, 5)
    with _on_nothing(transformer, bench.surroundings):
        speeds = _speeds_of(transformer)
        sampler = EulerSampler(
            transformer, images, speeds, Timeline(), bench.surroundings, bench.limit, bench.ram_limit_bytes
        )
        sampler.plan(prompts, noise, STEPS)
        rates = _rates(transformer, bench, parts, transformer.file)
        speeds.put(
            Speeds(rates.flops, rates.bus_bytes, rates.disk_bytes or TYPICAL.disk_bytes, rates.memory_bytes)
        )  # those of now: what earlier runs have corrected would tell less of the forecast
        # as every schedule begins and ends; what lies between changes no second
        run = sampler.sample(prompts, noise, torch.linspace(1, 0, STEPS + 1)).report
        transformer.unload()
        bench.surroundings.left(transformer.hardware.device)
        block = parts.of(lambda: _visits(transformer, inputs, run.plan, bench.surroundings))
    notes = [SMALLER_PRODUCTS] if transformer.hardware.host_device else []
    notes += [f"memory ran out {run.out_of_memory} times"] if run.out_of_memory else []
    return CardReport(bench.machine, rates, (block,), transformer.model, run, tuple(notes))


def benchmark_card(
    hardware: Hardware,
    dtype_of: Callable[[Checkpoint], torch.dtype],
    bench: Bench,
    *,
    width: int,
    height: int,
    computing: Computing = Computing.AS_COMFYUI,
) -> CardReport:
    """Without a file: one block of the size of Qwen-Image's, of random weights in bf16, and in int8 where `computing`
    computes on it as stored, for an image of that many px; on a CPU a smaller block and image. dtype_of: in which
    products of a file are.

    Raises as `benchmark_model`; DoesNotFit for RAM, too.
    """
    SamplingRequest(width, height, 1, PROMPT_TOKENS)  # which refuses what is no size
    size = HOST_BLOCK if hardware.host_device else REAL
    check_room(random_block_bytes(size), "A block of the model's size", "Close other programs.")
    parts = _Parts(bench.surroundings, 3 + len(Stored))
    rates: Rates | None = None
    blocks = []
    for stored in Stored:
        file = random_block(stored, size)
        dtype = dtype_of(file)
        linear = linear_of(computing, file, [hardware], dtype)
        if stored is Stored.INT8 and "int8" not in linear.backends:
            continue
        transformer = QWEN_IMAGE.open(file, dtype=dtype, hardware=hardware, linear=linear)
        sides = HOST_SIDES if hardware.host_device else (width, height)
        inputs = _Inputs.of(transformer, QWEN_IMAGE.from_prompts, *sides)
        with _on_nothing(transformer, bench.surroundings):
            plan = plan_sampling(
                transformer,
                inputs.request,
                bench.limit,
                bench.ram_limit_bytes,
                _speeds_of(transformer),
                bench.surroundings,
            )
            rates = rates or _rates(transformer, bench, parts, None)
            measure = partial(_visits, transformer, inputs, plan, bench.surroundings)
            blocks.append(parts.of(measure))
    parts.end()
    assert rates is not None
    notes = [SMALLER_BLOCK] if hardware.host_device else []
    notes += [NO_INT8] if len(blocks) < len(Stored) else []
    return CardReport(bench.machine, rates, tuple(blocks), notes=tuple(notes))


@dataclass(frozen=True)
class _Inputs:
    """One image's noise, and a prompt (1, PROMPT_TOKENS, dim), of random numbers."""

    images: FromPrompts
    noise: Tensor
    prompt: Tensor
    request: SamplingRequest

    @classmethod
    def of(cls, transformer: Transformer, images: FromPrompts, width: int, height: int) -> "_Inputs":
        """Raises InvalidRequest for a size that cannot be made."""
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randn(1, PROMPT_TOKENS, images.prompt_dim(transformer), generator=generator)
        noise = torch.randn(images.noise_shape(1, width, height), generator=generator)
        request = images.request(transformer, [prompt], noise, STEPS)
        return cls(images, noise, prompt, replace(request, width=width, height=height))

    def branch(self, transformer: Transformer) -> Any:
        device, dtype = transformer.hardware.device, transformer.dtype
        return self.images.branch(self.noise.to(device, dtype), self.prompt.to(device, dtype), 1.0)


class _Parts:
    """Of a measurement, one after the other: the program around may end it between them, and is told."""

    def __init__(self, surroundings: Surroundings, total: int) -> None:
        self._surroundings, self._total, self._done = surroundings, total, 0
        self._progress = PhaseProgress(surroundings, Phase.MEASURING)

    def of(self, measure: Callable[[], T]) -> T:
        self._surroundings.check()
        self._progress(self._done, self._total)
        measured = measure()
        self._done += 1
        self._progress(self._done, self._total)
        return measured

    def end(self) -> None:
        """Some of them have been left out."""
        self._progress(self._total, self._total)


@contextmanager
def _on_nothing(transformer: Transformer, surroundings: Surroundings) -> Iterator[None]:
    """With nothing of the transformer on its device when it begins, nor when it ends."""

    def leave() -> None:
        transformer.unload()
        surroundings.left(transformer.hardware.device)

    leave()
    try:
        yield
    finally:
        leave()


def _speeds_of(transformer: Transformer) -> KnownSpeeds:
    """Not measured yet, and remembered nowhere."""
    speeds = KnownSpeeds(
        transformer.hardware,
        transformer.products_dtype,
        transformer.file,
        file=None,
        device_name=str(transformer.hardware.device),
        product=transformer.stored_product,
    )
    speeds.put(TYPICAL)
    return speeds


def _rates(transformer: Transformer, bench: Bench, parts: _Parts, file: Path | None) -> Rates:
    """`file`: on the disk that is measured."""
    hardware, product = transformer.hardware, transformer.stored_product
    if not hardware.host_device:
        _require_room(hardware, bench)
    disk_bytes = None if file is None else parts.of(lambda: measure_disk(file))
    return Rates(
        flops=parts.of(lambda: measure_flops(hardware, transformer.products_dtype, product)),
        products=_products(transformer),
        bus_bytes=parts.of(lambda: measure_bus(hardware)),
        memory_bytes=parts.of(lambda: measure_memory(hardware)),
        disk_bytes=disk_bytes,
    )


def _require_room(hardware: Hardware, bench: Bench) -> None:
    free = bench.surroundings.device_bytes(hardware.device, bench.limit.nbytes, MEASURING_BYTES)
    if free < MEASURING_BYTES:
        with bench.limit.naming(hardware.device, free):
            raise DoesNotFit(
                "Measuring the card needs {need_bytes} of its memory, but {room_bytes} may be used.\n\nWhat to do: "
                "raise the limit, or close other programs that use the card.",
                code="benchmark.no_room",
                need_bytes=MEASURING_BYTES,
                room_bytes=free,
            )


def _products(transformer: Transformer) -> str:
    product = transformer.stored_product
    if product is None:
        return FORMAT_OF_DTYPE[transformer.products_dtype]
    return f"{product.name} by comfy-kitchen {product.backend}"


def _visits(transformer: Transformer, inputs: _Inputs, plan: MemoryPlan, surroundings: Surroundings) -> BlockVisit:
    """Of the first block: through one slot, so that nothing is brought while it computes; from host memory where the
    plan's limits have room for it."""
    held = _may_be_held(transformer, plan)
    in_memory = all(part.data is not None for part in transformer.store.blocks[0].parts)
    transformer.load((), held=(0,) if held else ())
    branch = inputs.branch(transformer)
    transformer.modulation.announce([branch.timestep], on_block=lambda index: surroundings.check())
    store = transformer.store
    with BlockStreamer(store, slots=1, blocks=range(1)) as streamer:
        session = TransformerSession(
            transformer, [Part(streamer, [Seat(transformer.hardware, 1, plan.mlp_chunk_tokens)])]
        )
        session.forward([branch], check=surroundings.check)  # it comes from the file, and kernels are chosen
        bringing = _repeated(lambda: deque(streamer.visit(), maxlen=0), store.order, surroundings)
        before = streamer.waits
        visits = _repeated(lambda: session.forward([branch], check=surroundings.check), store.order, surroundings)
        waited = (streamer.waits - before).seconds
    return BlockVisit(
        weight_format=transformer.weight_format,
        products=_products(transformer),
        stored_bytes=store.raw_bytes,
        inner_dim=transformer.footprint.inner_dim,
        width=inputs.request.width,
        height=inputs.request.height,
        prompt_tokens=PROMPT_TOKENS,
        source="RAM" if held or in_memory else "file",
        visits=len(visits),
        brought_seconds=sum(bringing) / len(bringing),
        computed_seconds=(sum(visits) - waited) / len(visits),
    )


def _repeated(visit: Callable[[], object], order: StreamOrder, surroundings: Surroundings) -> list[float]:
    """Seconds of each visit on the device, BLOCK_SECONDS or more in all."""
    clock = PassClock(order)
    while sum(clock.seconds) < BLOCK_SECONDS:
        surroundings.check()
        with clock.measuring():
            visit()
    return clock.seconds


def _may_be_held(transformer: Transformer, plan: MemoryPlan) -> bool:
    """Where the device is the host, a block comes straight from its file."""
    if transformer.hardware.host_device:
        return False
    ram, nbytes = plan.limits.ram_bytes, transformer.store.raw_bytes
    return bool(plan.held) or ram is None or plan.ram_peak_bytes + nbytes <= ram
