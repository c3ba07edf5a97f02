"""Tell the page what a run does, block by block, and let the person interrupt it between two blocks."""

import html
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import psutil
import torch
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...engine.planning.memory import MemoryPlan
from ...engine.texts import printable

EVENT = "qwen_lowvram.progress"
SECONDS_BETWEEN_EVENTS = 0.2
# a forecast that is worth a warning: an image of the usual size takes minutes on the slowest cards
LONG_SECONDS = 2 * 3600


def executing_node_id() -> str | None:
    """The id of the node that runs in this thread; composite inside subgraphs, so never a number."""
    context = get_executing_context()
    return None if context is None else context.node_id


def send(event: str, data: dict[str, Any]) -> None:
    """Send to the page that queued the prompt; nothing where no server runs."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync(event, data, server.client_id)


def tell(text: str) -> None:
    """Show a text on the node that runs; nowhere without a server. Keys and file names in it stay what they are: the
    page reads such texts as HTML, and what no encoding has would end the connection."""
    server, node = getattr(PromptServer, "instance", None), executing_node_id()
    if server is not None and node is not None:
        server.send_progress_text(html.escape(printable(text, lines=True), quote=False), node, server.client_id)


def warning_of(plan: MemoryPlan) -> str:
    """What is said of a run that takes LONG_SECONDS or more; empty for any other."""
    request, seconds = plan.request, plan.forecast.seconds * plan.request.timesteps
    if seconds < LONG_SECONDS:
        return ""
    return (
        f"This run will take about {seconds / 3600:,.1f} hours ({request.width}x{request.height} px, "
        f"{request.timesteps} steps, {plan.forecast}). It can be interrupted at any time; a smaller image takes less."
    )


@dataclass
class MemoryWatch:
    """Present and peak memory of this process, in bytes. VRAM is None where the device has none of its own."""

    device: torch.device
    peak_ram: int = 0
    _earlier_vram: int = 0
    _process: psutil.Process = field(default_factory=psutil.Process)

    def start(self) -> None:
        self.peak_ram = 0
        self.begin_stage()
        self._earlier_vram = 0
        self.ram()

    def begin_stage(self) -> None:
        """From now on `stage_peak_vram` is that of another stage; `peak_vram` remembers those before."""
        if (counter := self._counter()) is not None:
            self._earlier_vram = max(self._earlier_vram, self.stage_peak_vram() or 0)
            counter.reset_peak_memory_stats(self.device)

    def ram(self) -> int:
        now = self._process.memory_info().rss
        self.peak_ram = max(self.peak_ram, now)
        return now

    def vram(self) -> int | None:
        counter = self._counter()
        return None if counter is None else counter.memory_allocated(self.device)

    def _counter(self) -> Any:
        """torch's module that counts this device's memory; None where it has none of its own, or nobody counts."""
        return {"cuda": torch.cuda, "xpu": torch.xpu}.get(self.device.type)

    def peak_vram(self) -> int | None:
        stage = self.stage_peak_vram()
        return None if stage is None else max(stage, self._earlier_vram)

    def stage_peak_vram(self) -> int | None:
        counter = self._counter()
        return None if counter is None else counter.max_memory_allocated(self.device)


class RunProgress:
    """Counts passes and blocks of one run; sends each stage's first event, then at most five a second."""

    def __init__(
        self,
        watch: MemoryWatch,
        look: Callable[[], None],
        *,
        blocks: int,
        steps: int,
        limit_bytes: int,
        plan: str,
        forecast_seconds: float,
    ) -> None:
        """`look` is called at every block, to look at the memory."""
        self._watch = watch
        self._look = look
        self._node = executing_node_id()
        self._facts: dict[str, Any] = {
            "blocks": blocks,
            "steps": steps,
            "limit_bytes": limit_bytes,
            "plan": plan,
            "forecast_seconds_per_step": forecast_seconds,
        }
        self._start = time.perf_counter()
        self._sampling_start: float | None = None
        self._last = 0.0
        self._stage = ""
        self.step = 0

    def replanned(self, plan: str, limit_bytes: int, forecast_seconds: float) -> None:
        """The run goes on with another plan."""
        self._facts |= {"plan": plan, "limit_bytes": limit_bytes, "forecast_seconds_per_step": forecast_seconds}
        self._last = 0.0  # it is shown with the next block

    def modulation(self, block: int) -> None:
        self._report("modulation", block)

    def sampling(self, block: int) -> None:
        if self._sampling_start is None:
            self._sampling_start = time.perf_counter()
        self._report("sampling", block)

    def done(self) -> None:
        self._report("done", self._facts["blocks"] - 1)

    def _report(self, stage: str, block: int) -> None:
        if stage != "done":
            comfy.model_management.throw_exception_if_processing_interrupted()
        now = time.perf_counter()
        ram = self._watch.ram()
        self._look()
        if stage == self._stage and now - self._last < SECONDS_BETWEEN_EVENTS:
            return
        self._last, self._stage = now, stage
        done = self.step + (block + 1) / self._facts["blocks"]
        sampling = now - self._sampling_start if self._sampling_start is not None else 0.0
        send(
            EVENT,
            {
                **self._facts,
                "node": self._node,
                "stage": stage,
                "step": min(self.step + 1, self._facts["steps"]),
                "block": block + 1,
                "ram_bytes": ram,
                "peak_ram_bytes": self._watch.peak_ram,
                "vram_bytes": self._watch.vram(),
                "peak_vram_bytes": self._watch.peak_vram(),
                "seconds": now - self._start,
                "seconds_per_step": sampling / done if done else 0.0,
            },
        )
