"""One sampling run: what it asks for, the plan for it, its passes, and the report of it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import comfy.model_management
import comfy.samplers
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...engine.errors import DoesNotFit
from ...engine.log import logger
from ...engine.models.network import Hooked
from ...engine.models.qwen_image.branch import Branch
from ...engine.models.qwen_image.transformer import QwenImageTransformer
from ...engine.models.streamed_transformer import TransformerSession
from ...engine.out_of_memory import Short, ran_out, reason, shortage
from ...engine.planning.forecast import corrected
from ...engine.planning.memory import MemoryPlan, least_bytes, least_ram_bytes, plan_memory
from ...engine.planning.request import Limits, size_text
from ...engine.planning.stages import Stage, StagePlan, load_stage, modulation_stage, sampling_stage
from ...engine.reports.image_report import Moved
from ...engine.reports.memory_report import MemoryReport
from ...engine.runs.known_speeds import KnownSpeeds
from ...engine.runs.memory_watch import MemoryWatch
from ...engine.runs.run_progress import RunProgress, warning_of
from ...engine.runs.timeline import Timeline
from ...engine.streaming import Waits
from .limits import free_ram, stage_bytes
from .surroundings import InComfyUI

# smaller steps tell of Python's speed, not of the machine's
TELLING_FLOPS = 1e12
# after running out of memory although enough seemed free: plan for this part of what the last plan took, then for its
# powers, so that a few tries reach the least
SMALLER = 0.85
# each with a smaller plan than the one before
MOST_TRIES = 8

T = TypeVar("T")


class SamplingRun:
    """Owns what one run holds, from `load` to `end`.

    Where memory runs out all the same, what the run holds is given back, and what was being done is done again with
    smaller plans: the image is the same.
    """

    def __init__(
        self,
        transformer: QwenImageTransformer,
        plan: MemoryPlan,
        sigmas: Tensor,
        one_by_one: str,
        speeds: KnownSpeeds,
        timeline: Timeline,
        *,
        patcher: ModelPatcher,
        beside: Sequence[ModelPatcher] = (),
        advice: str = "",
    ) -> None:
        """`patcher`: ComfyUI's, of the transformer. `beside`: what is on the device with it."""
        self.plan = plan
        self._patcher = patcher
        self._advice = advice
        self._beside = beside
        self._transformer = transformer
        self._sigmas = sigmas
        self._one_by_one = one_by_one
        self._speeds = speeds
        self._watch = MemoryWatch(transformer.hardware.device)
        self._stack = ExitStack()
        self._session: TransformerSession | None = None
        self._timesteps: list[float] = []
        self._seen: set[float] = set()
        self._passes = 0
        self._retries = 0
        self._pass_seconds = 0.0
        self._first_step_seconds = 0.0
        self._first_pass = 0.0, Waits()
        self._waited = Waits()
        self._timeline = timeline
        self._start = time.perf_counter()
        store, table = transformer.store, transformer.modulation
        self._before = (store.fetched_blocks, store.fetched_bytes, table.fetched_bytes, store.copied_bytes)
        self._progress = RunProgress(
            InComfyUI(patcher, beside),
            self._watch,
            timeline.sample,
            blocks=transformer.footprint.blocks,
            steps=len(sigmas) - 1,
            limit_bytes=plan.limit_bytes,
            plan=self._shown_plan(),
            forecast_seconds=plan.forecast.seconds,
        )

    def load(self) -> None:
        """Bring what stays on the device there."""
        with self._stage(Stage.LOAD, load_stage):
            self.attempt(self._load)

    def begin(self, model_sampling: Any) -> None:
        """The resident weights are on the device: compute the modulation table, then open the slots."""
        self._watch.start()
        logger.info("%s", self.plan)
        if self._advice:
            logger.info("%s", self._advice)
        if warning := warning_of(self.plan):
            logger.warning("%s", warning)
        self._timesteps = [float(t) for t in model_sampling.timestep(self._sigmas[self._sigmas > 0]).float()]
        self.attempt(self._open)

    def forward(self, branches: list[Branch], hooked: Sequence[Hooked] = ()) -> list[Tensor]:
        """One pass over the blocks for all branches; `hooked` are those with something around their blocks."""
        timestep = min(branch.timestep for branch in branches)
        if timestep not in self._seen:
            self._seen.add(timestep)
            self._progress.step = len(self._seen) - 1
        more = timestep > min(self._timesteps, default=0.0)
        start = time.perf_counter()
        on_block, check = self._progress.sampling, comfy.model_management.throw_exception_if_processing_interrupted

        def compute() -> list[Tensor]:
            return self._opened().forward(branches, hooked=hooked, more=more, on_block=on_block, check=check)

        result = self.attempt(compute)
        self._pass_seconds += time.perf_counter() - start
        self._passes += 1
        if self._passes == 1:
            self._first_step_seconds = time.perf_counter() - self._start
            self._first_pass = self._pass_seconds, self._waited + self._opened().waits
        return result

    def end(self, *, finished: bool) -> MemoryReport:
        """Give back what the run held on the device; not `finished`: after an error or an interruption."""
        self._close()
        self._watch.ram()
        store, table = self._transformer.store, self._transformer.modulation
        report = MemoryReport(
            plan=self.plan,
            device=str(self._transformer.hardware.device),
            weight_format=self._transformer.weight_format,
            steps=len(self._sigmas) - 1,
            passes=self._passes,
            seconds=time.perf_counter() - self._start,
            pass_seconds=self._pass_seconds,
            fetched_blocks=store.fetched_blocks - self._before[0],
            fetched_bytes=store.fetched_bytes - self._before[1],
            modulation_bytes=table.fetched_bytes - self._before[2],
            copied_bytes=store.copied_bytes - self._before[3],
            pinned_bytes=store.pinned_bytes,
            waited_disk_seconds=self._waited.disk_seconds,
            waited_bus_seconds=self._waited.bus_seconds,
            peak_vram_bytes=self._watch.peak_vram(),
            peak_ram_bytes=self._watch.peak_ram,
            one_by_one=self._one_by_one,
            out_of_memory=self._retries,
            first_step_seconds=self._first_step_seconds,
        )
        if finished:
            self._progress.done()
            self._learn()
        logger.info("%s", report)
        return report

    def _load(self) -> None:
        self._transformer.load(
            self.plan.resident,
            self.plan.held,
            self.plan.annexes,
            on_block=lambda index: comfy.model_management.throw_exception_if_processing_interrupted(),
        )

    def _open(self) -> None:
        table = self._transformer.modulation
        with nullcontext() if table.knows(self._timesteps) else self._stage(Stage.MODULATION, modulation_stage):
            table.announce(self._timesteps, on_block=self._progress.modulation)
        self._stack.enter_context(self._stage(Stage.SAMPLING, sampling_stage))
        self._session = self._stack.enter_context(
            self._transformer.session(
                slots=self.plan.slots, mlp_chunk_tokens=self.plan.mlp_chunk_tokens, annexes=self.plan.annexes
            )
        )

    def _opened(self) -> TransformerSession:
        if self._session is None:
            self._open()
        assert self._session is not None
        return self._session

    def _close(self) -> None:
        session, self._session = self._session, None
        try:
            if session is not None:
                self._waited += session.waits
        finally:
            self._stack.close()

    @contextmanager
    def _stage(self, stage: Stage, plan: Callable[[Any, MemoryPlan], StagePlan]) -> Iterator[None]:
        """Measure what happens within it."""
        transformer = self._transformer
        with self._timeline.stage(
            stage,
            transformer.hardware.device,
            own_bytes=transformer.loaded_bytes + sum(other.loaded_size() for other in self._beside),
            moved=self._moved,
            watch=self._watch,
        ) as running:
            running.planned(plan(transformer.footprint, self.plan))
            running.attempts += self._retries
            yield

    def _moved(self) -> Moved:
        store, table = self._transformer.store, self._transformer.modulation
        waits = self._waited + table.waits
        return Moved(
            file_bytes=store.fetched_bytes + table.fetched_bytes,
            copied_bytes=store.copied_bytes + table.copied_bytes,
            disk_seconds=waits.disk_seconds,
            bus_seconds=waits.bus_seconds,
        )

    def attempt(self, action: Callable[[], T]) -> T:
        """Do it; where memory runs out, plan smaller and do it again, until it fits or no smaller plan does.

        Raises OutOfMemory or OutOfRam where nothing helped.
        """
        for tried in range(MOST_TRIES):
            try:
                if tried:
                    self._load()
                return action()
            except Exception as error:
                short = shortage(error)
                if short is None:
                    raise
                why = reason(error)
            if tried == MOST_TRIES - 1:
                break
            # after the except block: the traceback keeps the failed attempt's tensors alive
            self._plan_smaller(short, why, SMALLER ** (tried + 1))
        self._close()
        raise ran_out(_when(self.plan, short), short, why)

    def _plan_smaller(self, short: Short, why: str, part: float) -> None:
        """Plan within what is really free now; where that is as much as before, within that part of the last plan."""
        self._close()
        transformer, plan = self._transformer, self.plan
        for store in (transformer.store, *transformer.annexes.values()):
            store.release()
        self._patcher.model.model_loaded_weight_memory = transformer.loaded_bytes  # else it would count as free twice
        comfy.model_management.soft_empty_cache()
        try:
            self.plan = plan_memory(
                transformer.footprint,
                plan.request,
                self._smaller_limits(short, part),
                self._speeds.get(),  # and without the other devices: one of them may be full
            )
        except DoesNotFit:
            raise ran_out(_when(plan, short), short, why) from None
        self._retries += 1
        self._progress.replanned(self._shown_plan(), self.plan.limit_bytes, self.plan.forecast.seconds)
        logger.warning("Memory ran out (%s). What was being done is done again with a smaller plan: %s", why, self.plan)

    def _smaller_limits(self, short: Short, part: float) -> Limits:
        transformer, plan = self._transformer, self.plan
        hardware, limits = transformer.hardware, plan.limits
        if short is Short.HOST and not (hardware.host_device or hardware.unified):
            least = least_ram_bytes(transformer.footprint, plan.request)
            free = max(least, free_ram() + transformer.store.held_bytes)  # the least is granted, as when it began
            return replace(limits, ram_bytes=_below(plan.ram_peak_bytes, free, part, least))
        least = least_bytes(transformer.footprint, plan.request)
        free = stage_bytes(
            hardware.device, limits.vram_bytes, plan.peak_bytes, reused=self._patcher, beside=self._beside
        )
        return replace(limits, vram_bytes=_below(plan.peak_bytes, free, part, least))

    def _shown_plan(self) -> str:
        return "\n".join(text for text in (str(self.plan), self._advice, warning_of(self.plan)) if text)

    def _learn(self) -> None:
        """Correct what is known of this machine's speeds by what this run took."""
        footprint, plan, passes = self._transformer.footprint, self.plan, self._passes - 1
        small = footprint.step_flops(plan.request) < TELLING_FLOPS
        if self._one_by_one or self._retries or plan.request.controls or passes < 1 or small:
            return
        seconds, waited = self._first_pass  # which reads what stays in host memory, and is like no other
        waits = self._waited - waited
        self._speeds.put(
            corrected(
                self._speeds.get(),
                plan.forecast,
                step_seconds=(self._pass_seconds - seconds) / passes,
                waited_disk_seconds=waits.disk_seconds / passes,
                waited_bus_seconds=waits.bus_seconds / passes,
            )
        )


def _below(last: int, free: int, part: float, least: int) -> int:
    """A limit under `last`: what is free where that is less, else that part of it, but no less than the least."""
    return free if free < last else min(max(int(last * part), least), last - 1)


def _when(plan: MemoryPlan, short: Short) -> str:
    if short is Short.HOST:
        return f"although no more than {size_text(plan.ram_peak_bytes)} of it were planned ({plan.request})"
    return f"although {size_text(plan.peak_bytes)} were planned of {size_text(plan.limit_bytes)} ({plan.request})"
