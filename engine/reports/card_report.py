"""What a machine was measured to do, as a line to paste and as JSON. Values only; names no file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..numerics import NUMERICS_VERSION
from ..texts import size_text
from .memory_report import MemoryReport

VERSION = 1  # of the JSON: grows when something in it gets another meaning
# of a run's report: they may repeat an error of another library's, with a folder of the machine in it
_FOREIGN = ("text", "attention_notes", "not_compiled")


@dataclass(frozen=True)
class Rates:
    """In a second: floating-point operations of a product like the model's, of the kind of numbers that `products`
    says; bytes from host memory to the device; bytes of the device's own memory; bytes of the model's file, None where
    no file was given."""

    flops: float
    products: str
    bus_bytes: float
    memory_bytes: float
    disk_bytes: float | None


@dataclass(frozen=True)
class BlockVisit:
    """One block, brought to the device from `source` (RAM, or its file) and computed for one prompt, in the mean of
    `visits`.

    weight_format: as it is stored, in stored_bytes. products: what its linear layers multiply. brought_seconds: read or
    copied, and decoded, with nothing computed meanwhile. computed_seconds: all else, the layers before and behind all
    blocks included. inner_dim: its width. width, height: of the image in px.
    """

    weight_format: str
    products: str
    stored_bytes: int
    inner_dim: int
    width: int
    height: int
    prompt_tokens: int
    source: str
    visits: int
    brought_seconds: float
    computed_seconds: float

    def __str__(self) -> str:
        stored = f"{self.weight_format} ({self.stored_bytes / 1e9:.2f} GB, products {self.products})"
        return (
            f"{stored} brought from {self.source} in "
            f"{1000 * self.brought_seconds:.1f} ms, computed in {1000 * self.computed_seconds:.1f} ms"
        )


@dataclass(frozen=True)
class CardReport:
    """machine: as `machine_facts` has it, and what else a program knows of itself. model: what a person calls it; empty
    where there was none, and no `run`. notes: what a reader has to know of the numbers."""

    machine: Mapping[str, Any]
    rates: Rates
    blocks: tuple[BlockVisit, ...]
    model: str = ""
    run: MemoryReport | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON. All sizes are in bytes, all times in seconds."""
        return {
            "version": VERSION,
            "line": self.line,
            "machine": dict(self.machine),
            "rates": asdict(self.rates),
            "blocks": [asdict(block) for block in self.blocks],
            "model": self.model or None,
            "run": None if self.run is None else _of_run(self.run),
            "notes": list(self.notes),
            "numerics_version": NUMERICS_VERSION,
        }

    @property
    def line(self) -> str:
        """Of a table of machines, in English."""
        parts = [self._machine, self._run if self.run else self._blocks, self._rates, *self.notes]
        return " | ".join(parts)

    @property
    def _machine(self) -> str:
        facts = self.machine
        size = facts.get("device_bytes")
        versions = [
            f"{words} {facts[name]}"
            for name, words in (
                ("driver", "driver"),
                ("cuda", "CUDA"),
                ("rocm", "ROCm"),
                ("torch", "torch"),
                ("comfy_kitchen", "comfy-kitchen"),
                ("comfyui", "ComfyUI"),
                ("pack", "pack"),
            )
            if facts.get(name)
        ]
        name = facts["device"] if size is None else f"{facts['device']} {size_text(size)}"
        return ", ".join([name, f"RAM {size_text(facts['ram_bytes'])}", facts["system"], *versions])

    @property
    def _run(self) -> str:
        assert self.run is not None
        plan, run = self.run.plan, self.run
        request = plan.request
        (block,) = self.blocks
        held = f"{size_text(plan.peak_bytes)} planned of {size_text(plan.limit_bytes)}"
        if run.peak_vram_bytes is not None:
            held = f"VRAM peak {size_text(run.peak_vram_bytes)}, {held}"
        else:
            held = f"memory {held} (no VRAM)"
        return (
            f"{self.model} {run.weight_format}, {plan.blocks} blocks of {block.stored_bytes / 1e9:.2f} GB, "
            f"{len(plan.resident)} stay on the device, {request.width}x{request.height}, cfg 1: "
            f"{run.later_seconds:.3g} s/step (forecast {plan.forecast.seconds:.3g}), {held} | block: {block}"
        )

    @property
    def _blocks(self) -> str:
        size = self.blocks[0]
        blocks = "; ".join(map(str, self.blocks))
        return f"no model file: one block of random weights, {size.width}x{size.height}: {blocks}"

    @property
    def _rates(self) -> str:
        rates = self.rates
        disk = "disk not measured" if rates.disk_bytes is None else f"disk {rates.disk_bytes / 1e9:.2f} GB/s"
        return f"bus {rates.bus_bytes / 1e9:.1f} GB/s, {disk}, {rates.flops / 1e12:.3g} TFLOP/s ({rates.products})"


def _of_run(run: MemoryReport) -> dict[str, Any]:
    return {name: value for name, value in run.as_dict().items() if name not in _FOREIGN}
