"""One sampling run: its passes within its plan, and the report of it. Any sampler may drive it."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..compute.step_schedules import FirstBlockRule, StepCache, StepSchedule
from ..errors import DoesNotFit, Unsupported
from ..log import logger
from ..out_of_memory import Short
from ..planning.forecast import Throughput, corrected
from ..planning.memory import plan_memory
from ..planning.memory_plan import MemoryPlan
from ..reports.memory_report import MemoryReport
from ..reports.plan_facts import plan_facts
from ..streaming import OnBlock, Waits
from . import retry
from .branch_keys import BranchKey
from .expected_timesteps import ExpectedTimesteps
from .first_block import FirstBlock
from .known_speeds import KnownSpeeds
from .memory_watch import MemoryWatch
from .pass_clock import PassClock
from .passes import Passes
from .run_progress import RunProgress, ShownPlan, warning_of
from .sampling_plan import Transformer
from .sampling_session import SamplingSession
from .spilling import spill_warning
from .step_predictions import StepPredictions
from .surroundings import Surroundings
from .timeline import Timeline

# smaller steps tell of Python's speed, not of the machine's
TELLING_FLOPS = 1e12

T = TypeVar("T")


class SamplingRun:
    """Owns what one run holds, from `load` over `begin` and any number of passes to `end`.

    Where memory runs out all the same, what the run holds is given back, and what was being done is done again with
    smaller plans: the image is the same. Of several processes of an image none can do anything again without the
    others: there the error is raised.
    """

    def __init__(
        self,
        transformer: Transformer,
        plan: MemoryPlan,
        *,
        steps: int,
        speeds: KnownSpeeds,
        timeline: Timeline,
        surroundings: Surroundings,
        one_by_one: str = "",
        advice: str = "",
    ) -> None:
        """`one_by_one`: why the branches of a step do not share its passes; empty where they do. `advice`: told beside
        each plan."""
        self._transformer, self._surroundings = transformer, surroundings
        cache, model = plan.request.step_cache, transformer.model
        self._not_measured = "" if cache is None else cache.not_measured(model, plan.request)
        advice = " ".join(text for text in (advice, self._not_measured) if text)
        self._steps, self._one_by_one, self._advice = steps, one_by_one, advice
        self._speeds = speeds
        self._watch = MemoryWatch(transformer.hardware.device)
        self._further = {name: MemoryWatch(torch.device(name)) for name in transformer.secondaries}
        self._session = SamplingSession(transformer, plan, timeline, self._watch, surroundings)
        self._timesteps: Sequence[float] = ()
        self._expected = ExpectedTimesteps(transformer.store.order, ())
        self._cached: StepPredictions | FirstBlock | None = None  # where not every step is computed
        self._seen: set[float] = set()
        self._clock = PassClock(transformer.store.order)
        self._first_waits = Waits()
        self._copied_before = self._read_before = Throughput()
        self._start = time.perf_counter()
        self._progress = RunProgress(
            surroundings,
            self._watch,
            timeline.sample,
            lambda: _host_bytes(transformer),
            blocks=transformer.footprint.blocks,
            ahead=int(transformer.hardware.streams),
            steps=steps,
            passes=min(2, plan.whole_request.distinct_prompts) if one_by_one else 1,
            plan=self._shown_plan(),
        )

    @property
    def plan(self) -> MemoryPlan:
        """The present one."""
        return self._session.plan

    def load(self) -> None:
        """Bring what stays on the device there."""
        with self._session.measured_load():
            self.attempt(self._load)

    def begin(self, timesteps: Sequence[float]) -> None:
        """The resident weights are on the device: compute what is computed of `timesteps`, then open the slots."""
        for watch in (self._watch, *self._further.values()):
            watch.start()
        logger.info("%s", self.plan)
        if self._advice:
            logger.info("%s", self._advice)
        if warning := warning_of(self.plan):
            logger.warning("%s", warning)
        self._timesteps = timesteps
        self._progress.begins(timesteps)
        self._copied_before, self._read_before = self._transformer.store.copied, self._transformer.store.read
        self._expected = ExpectedTimesteps(self._transformer.store.order, timesteps)
        self._cached = _cached_steps(self.plan.request.step_cache, timesteps)
        self.attempt(self._open)

    def forward_at(
        self,
        timesteps: Tensor,
        branches: Callable[[Sequence[float]], Sequence[Any]],
        hooked: Sequence[Any] = (),
        *,
        ahead: bool,
        keys: Sequence[BranchKey] = (),
    ) -> list[Tensor]:
        """As `forward`, of `branches(values)`, the values of timesteps that may lie on the device. `ahead`: the pass
        may begin with those that are expected, and be made again if they were others."""

        def compute(values: Sequence[float], on_block: OnBlock) -> list[Tensor]:
            return self.forward(branches(values), hooked, on_block=on_block, keys=keys)

        return self._expected.run(timesteps, compute, ahead=ahead)

    def forward(
        self,
        branches: Sequence[Any],
        hooked: Sequence[Any] = (),
        *,
        on_block: OnBlock | None = None,
        keys: Sequence[BranchKey] = (),
    ) -> list[Tensor]:
        """One pass over the blocks for all branches; `hooked` are those with something around their blocks. `on_block`
        is called before each block with its index, and may raise.

        `keys`: tell the branches from each other, the same in every step; not given: their order does, and they are of
        one image. A step that is
        predicted visits no block, or only the first; raises Unsupported as `StepPredictions.predict`, and for hooked
        branches.
        """
        timestep = min(branch.timestep for branch in branches)
        new = timestep not in self._seen
        if new:
            self._seen.add(timestep)
        self._progress.evaluation(timestep)

        def begin_block(index: int) -> None:
            self._progress.sampling(index)
            if on_block is not None:
                on_block(index)

        if self._clock.passes == 1:
            self._first_waits = self._session.waits
        passes = Passes(
            timestep,
            min(self._timesteps, default=0.0),
            self._opened,
            self.attempt,
            self._clock,
            begin_block,
            self._surroundings.check,
        )
        try:
            if self._cached is None:
                answers = passes.compute(branches, hooked, more=timestep > passes.last_timestep)
                self._progress.evaluated()
                return answers
            if hooked:
                raise Unsupported(
                    "Patches around the model's blocks are called in every step, but step_cache computes only some of "
                    "them.\n\nWhat to do: remove the node that sets the patch, or set step_cache to off.",
                    code="run.patches_of_predicted_steps",
                )
            keys = keys or [BranchKey(0, index) for index in range(len(branches))]
            answers = self._cached.answers(passes, branches, keys)
            self._progress.evaluated()
            return answers
        except BaseException:
            if new:
                self._seen.discard(timestep)  # it has not been computed
            raise

    def _opened(self) -> SamplingSession:
        if not self._session.is_open:
            self._open()
        return self._session

    def end(self, *, finished: bool) -> MemoryReport:
        """Give back what the run held on the device; not `finished`: after an error or an interruption."""
        session, transformer, cached = self._session, self._transformer, self._cached
        session.close()
        if cached is not None:
            cached.clear()
        passes = self._clock.seconds
        self._watch.ram()
        report = MemoryReport(
            plan=self.plan,
            device=str(transformer.hardware.device),
            weight_format=transformer.weight_format,
            steps=self._steps,
            passes=len(passes),
            seconds=time.perf_counter() - self._start,
            pass_seconds=sum(passes),
            pinned_bytes=transformer.store.pinned_bytes,
            waited_disk_seconds=session.waits.disk_seconds,
            waited_bus_seconds=session.waits.bus_seconds,
            peak_vram_bytes=self._watch.peak_vram(),
            further_peaks_bytes=tuple(self._further[other.device].peak_vram() for other in self.plan.further),
            peak_ram_bytes=self._watch.peak_ram,
            one_by_one=self._one_by_one,
            out_of_memory=session.retries,
            attention_notes="; ".join(sorted(session.attention_notes)),
            first_step_seconds=self._clock.first_seconds,
            later_seconds=sum(passes[1:]) / max(1, len(passes) - 1),
            computed_steps=0 if cached is None else cached.computed_steps,
            predicted_steps=0 if cached is None else cached.predicted_steps,
            not_measured=self._not_measured,
            done_steps=self._steps if finished else self._progress.done_steps,
            **session.counters.of_run(),
        )
        if report.attention_notes:
            logger.warning("Attention was partly computed by torch's own kernel: %s.", report.attention_notes)
        if finished:
            self._progress.done()
            self._learn()
        else:
            self._progress.stopped()
        logger.info("%s", report)
        return report

    def attempt(self, action: Callable[[], T]) -> T:
        """Do it; where memory runs out, plan smaller and do it again, until it fits or no smaller plan does.

        Raises OutOfMemory or OutOfRam where nothing helped.
        """
        retries = self._session.retries

        def again() -> T:
            if self._session.retries > retries:
                self._load()
            return action()

        return retry.attempt(again, self._plan_smaller, self._give_up)

    def _load(self) -> None:
        self._session.load(self._progress.loading)

    def _open(self) -> None:
        self._session.open(self._timesteps, self._progress.modulation)

    def _give_up(self, short: Short, why: str) -> Exception:
        self._session.close()
        return retry.no_memory(self.plan, short, why)

    def _plan_smaller(self, short: Short, why: str, part: float) -> None:
        """Plan within what is really free now; where that is as much as before, within that part of the last plan."""
        session, transformer, plan = self._session, self._transformer, self.plan
        session.close()
        if plan.request.ranks > 1:
            raise retry.no_memory(plan, short, why)
        for store in (transformer.store, *transformer.secondaries.values()):
            store.release()
        self._surroundings.left(transformer.hardware.device)
        if transformer.compiled is not None:
            transformer.compiled.give_up("memory ran out")
        try:
            session.plan = plan_memory(
                transformer.footprint,
                plan.whole_request,
                retry.smaller_limits(transformer, plan, short, part, self._surroundings),
                self._speeds.get(),  # and without the other devices: one of them may be full
            )
        except DoesNotFit:
            raise retry.no_memory(plan, short, why) from None
        session.retries += 1
        self._progress.replanned(self._shown_plan())
        logger.warning("Memory ran out (%s). What was being done is done again with a smaller plan: %s", why, self.plan)

    def _shown_plan(self) -> ShownPlan:
        plan, beside = self.plan, " ".join(text for text in (self._advice, warning_of(self.plan)) if text)
        host = self._transformer.hardware.host_device
        facts = plan_facts(plan, host=host, advice=beside, one_by_one=self._one_by_one)
        return ShownPlan("\n".join(text for text in (str(plan), beside) if text), facts, plan.run)

    def _learn(self) -> None:
        """Correct what is known of this machine's speeds by what this run took."""
        transformer, plan = self._transformer, self.plan
        others = self._clock.seconds[1:]  # the first reads what stays in host memory, and is like no other
        flops = transformer.footprint.step_flops(plan.request)
        if (
            plan.beside
            or self._one_by_one
            or self._session.retries
            or plan.request.controls
            or not others
            or flops < TELLING_FLOPS
        ):
            return
        if plan.request.ranks > 1 or isinstance(self._cached, FirstBlock):
            return  # of the other processes, or what passes that were left had waited for is among the waits
        step_seconds, waits, slowed = sum(others) / len(others), self._session.waits, plan.forecast.slowed_seconds
        waited = (waits - self._first_waits).seconds / len(others)
        forecast = plan.forecast.compute_seconds + slowed
        if transformer.hardware.streams and (warning := spill_warning(step_seconds - waited, forecast)):
            logger.warning("%s", warning)
            return  # of a full card's speed nothing is to be learnt
        self._speeds.put(
            corrected(
                self._speeds.get(),
                step_flops=flops,
                step_seconds=step_seconds,
                waited_seconds=waited,
                slowed_seconds=slowed,
                waited_disk_seconds=waits.disk_seconds,
                copied=transformer.store.copied - self._copied_before,
                read=transformer.store.read - self._read_before,
            )
        )


def _host_bytes(transformer: Transformer) -> int:
    """What the model's blocks take of host memory now."""
    on_device = transformer.loaded_bytes if transformer.hardware.host_device else 0
    return transformer.store.held_bytes + on_device


def _cached_steps(cache: StepCache | None, timesteps: Sequence[float]) -> StepPredictions | FirstBlock | None:
    if isinstance(cache, StepSchedule):
        return StepPredictions(cache, timesteps)
    return FirstBlock(cache) if isinstance(cache, FirstBlockRule) else None
