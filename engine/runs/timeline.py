"""Measure the stages of an image: memory over time, and each stage's peak beside its plan. Decides nothing."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import torch

from ..planning.stages import Stage, StagePlan
from ..reports.image_report import Moved, Sample, StageReport
from .memory_watch import MemoryWatch

# between samples while a stage runs; longer after every MOST_SAMPLES, of which then every second one goes
SECONDS_BETWEEN_SAMPLES = 0.05
MOST_SAMPLES = 2000
MOST_STAGES = 64


class RunningStage:
    """One visit of a stage. Whoever runs it says what was planned, when that is known."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.plan: StagePlan | None = None
        self.attempts = 0
        self.peak_ram = 0

    def planned(self, plan: StagePlan) -> None:
        """For one attempt, whose plan replaces the one before."""
        self.plan = plan
        self.attempts += 1


class Timeline:
    """What the stages of one image held, moved and took; the next image's first stage begins it anew.

    The models that make an image together share it. It holds MOST_SAMPLES samples at the most, however long a run is,
    and a thread only while a stage does.
    """

    def __init__(self, image: Callable[[], object] = lambda: None) -> None:
        """`image` tells which image is being made: where its answer is another than before, the next one is."""
        self._current = image
        self._process = psutil.Process()
        self._lock = threading.Lock()
        self._image: object = None
        self._start = time.perf_counter()
        self._ram_before: int | None = None
        self._samples: list[Sample] = []
        self._interval = SECONDS_BETWEEN_SAMPLES
        self._reports: deque[StageReport] = deque(maxlen=MOST_STAGES)
        self._running: RunningStage | None = None
        self._watch: MemoryWatch | None = None

    @property
    def samples(self) -> tuple[Sample, ...]:
        with self._lock:
            return tuple(self._samples)

    @property
    def reports(self) -> tuple[StageReport, ...]:
        """One for each stage that ran, in the order of the stages; visits of the same stage are put together."""
        merged: dict[Stage, StageReport] = {}
        for report in self._reports:
            before = merged.get(report.stage)
            merged[report.stage] = report if before is None else _together(before, report)
        return tuple(merged[stage] for stage in Stage if stage in merged)

    @contextmanager
    def stage(
        self,
        stage: Stage,
        device: torch.device,
        *,
        own_bytes: int = 0,
        moved: Callable[[], Moved] = Moved,
        watch: MemoryWatch | None = None,
    ) -> Iterator[RunningStage]:
        """Measure within it. own_bytes: of what lies on the device already, what the plan counts. moved: counters,
        looked at before and after. watch: the owner's, where peaks of several stages matter to it."""
        self._follow_image()
        if watch is None:
            watch = MemoryWatch(device)
            watch.start()
        watch.begin_stage()
        outer = self._running, self._watch
        running, moved_before = RunningStage(stage), moved()
        beside = max(0, (watch.vram() or 0) - own_bytes)
        start = time.perf_counter()
        with self._lock:
            self._running, self._watch = running, watch
        try:
            with self._sampling():
                yield running
        finally:
            with self._lock:
                self._running, self._watch = outer
            report = StageReport(
                stage=stage,
                plan=running.plan,
                start_seconds=start - self._start,
                seconds=time.perf_counter() - start,
                vram_bytes=watch.stage_peak_vram(),
                vram_beside_bytes=beside,
                ram_bytes=running.peak_ram,
                ram_before_bytes=self._ram_before or 0,
                moved=moved() - moved_before,
                attempts=max(1, running.attempts),
            )
            self._reports.append(report)

    def sample(self, *, kept: bool = False) -> None:
        """Look at the memory now. `kept`: even where the last look was a moment ago."""
        with self._lock:
            if self._running is None or self._watch is None:
                return
            ram = self._process.memory_info().rss
            self._running.peak_ram = max(self._running.peak_ram, ram)
            now = time.perf_counter() - self._start
            if not kept and self._samples and now - self._samples[-1].seconds < self._interval:
                return
            self._samples.append(Sample(now, self._watch.vram(), ram, self._running.stage))
            if len(self._samples) >= MOST_SAMPLES:
                del self._samples[1::2]
                self._interval *= 2

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        done = threading.Event()

        def look() -> None:
            while not done.wait(SECONDS_BETWEEN_SAMPLES):
                self.sample()

        thread = threading.Thread(target=look, name="qwen-timeline", daemon=True)
        self.sample(kept=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.sample(kept=True)

    def _follow_image(self) -> None:
        image = self._current()
        if self._ram_before is None:  # of the first image: what the models keep from then on is their own
            self._ram_before = self._process.memory_info().rss
        elif image == self._image:
            return
        self._image = image
        self._start = time.perf_counter()
        self._interval = SECONDS_BETWEEN_SAMPLES
        with self._lock:
            self._samples.clear()
        self._reports.clear()


def _together(first: StageReport, second: StageReport) -> StageReport:
    """Two visits of one stage: the larger plan and peaks, the sum of the rest."""
    plans = [report.plan for report in (first, second) if report.plan is not None]
    peaks = [report.vram_bytes for report in (first, second) if report.vram_bytes is not None]
    return replace(
        first,
        plan=max(plans, key=lambda plan: plan.peak_bytes, default=None),
        seconds=first.seconds + second.seconds,
        vram_bytes=max(peaks, default=None),
        vram_beside_bytes=max(first.vram_beside_bytes, second.vram_beside_bytes),
        ram_bytes=max(first.ram_bytes, second.ram_bytes),
        moved=first.moved + second.moved,
        attempts=first.attempts + second.attempts - 1,
    )
