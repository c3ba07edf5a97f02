"""The transformer on its devices as a plan has it, for one run: what stays there, the slots, and the passes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from ..models.transformer_session import TransformerSession
from ..planning.memory_plan import MemoryPlan
from ..planning.stages import Stage, StagePlan, load_stage, modulation_stage, sampling_stage
from ..streaming import Waits
from .memory_watch import MemoryWatch
from .run_counters import RunCounters
from .sampling_plan import Transformer
from .surroundings import Surroundings
from .timeline import Timeline


class SamplingSession:
    """Opens slots when the first pass needs them, measures each stage, and gives back what it opened when it closes.
    After `close` it can be opened again, with the plan that it has then."""

    def __init__(
        self,
        transformer: Transformer,
        plan: MemoryPlan,
        timeline: Timeline,
        watch: MemoryWatch,
        surroundings: Surroundings,
    ) -> None:
        self.plan = plan
        self.retries = 0
        self.counters = RunCounters(transformer)
        self._transformer = transformer
        self._timeline, self._watch, self._surroundings = timeline, watch, surroundings
        self._stack = ExitStack()
        self._session: TransformerSession[Any, Any] | None = None
        self._waited = Waits()  # in sessions that are closed
        self.attention_notes = set[str]()  # of those

    @property
    def waits(self) -> Waits:
        """How long compute has waited for blocks since the run began."""
        return self._waited if self._session is None else self._waited + self._session.waits

    def load(self, on_block: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Bring what stays on the devices there. `on_block(done, total)`: of the blocks that are not there yet."""
        plan, transformer, done = self.plan, self._transformer, 0
        there = {secondary.device: set(secondary.blocks) for secondary in plan.secondaries}
        missing = set(plan.resident) - transformer.store.resident
        for other in plan.beside:  # a block that goes to several is one
            missing |= set(other.plan.resident) - transformer.secondaries[other.device].resident
        total = len(missing)
        for device, store in transformer.secondaries.items():
            total += len(there.get(device, set()) - store.resident)

        def begin_block(index: int) -> None:
            nonlocal done
            self._surroundings.check()
            on_block(done, total)
            done += 1

        transformer.load(
            plan.resident, plan.held, plan.secondaries, plan.kept, beside=plan.beside, on_block=begin_block
        )
        on_block(total, total)

    @contextmanager
    def measured_load(self) -> Iterator[None]:
        """A `load` within it is a stage of its own."""
        with self._stage(Stage.LOAD, load_stage):
            yield

    def open(self, timesteps: Sequence[float], on_block: Callable[[int], None]) -> None:
        """Compute what the blocks compute of the timesteps alone, then open the slots."""
        table, plan = self._transformer.modulation, self.plan
        with nullcontext() if table.knows(timesteps) else self._stage(Stage.MODULATION, modulation_stage):
            table.announce(timesteps, on_block=on_block)
        self._stack.enter_context(self._stage(Stage.SAMPLING, sampling_stage))
        self._session = self._stack.enter_context(
            self._transformer.session(
                slots=plan.slots,
                ring=plan.ring,
                mlp_chunk_tokens=plan.mlp_chunk_tokens,
                secondaries=plan.secondaries,
                branches=plan.request.branches,
                beside=plan.beside,
            )
        )

    @property
    def is_open(self) -> bool:
        return self._session is not None

    def forward(self, branches: Sequence[Any], **options: Any) -> list[Tensor]:
        """One pass over the blocks, as `TransformerSession.forward`; only while it is open."""
        assert self._session is not None
        return self._session.forward(branches, **options)

    def answers_of(self, branches: Sequence[Any], hidden: Sequence[Tensor]) -> list[Tensor]:
        """As `TransformerSession.answers_of`; only while it is open."""
        assert self._session is not None
        return self._session.answers_of(branches, hidden)

    def close(self) -> None:
        session, self._session = self._session, None
        try:
            if session is not None:
                self._waited += session.waits
                self.attention_notes |= session.attention_notes
                self._transformer.store.order.finish_compute()  # what the stage took is what the device took
        finally:
            self._stack.close()

    @contextmanager
    def _stage(self, stage: Stage, plan: Callable[[Any, MemoryPlan], StagePlan]) -> Iterator[None]:
        """Measure what happens within it."""
        transformer = self._transformer
        with self._timeline.stage(
            stage,
            transformer.hardware.device,
            own_bytes=transformer.loaded_bytes + self._surroundings.beside_bytes(),
            moved=lambda: self.counters.moved(self._waited),
            watch=self._watch,
        ) as running:
            running.planned(plan(transformer.footprint, self.plan))
            running.attempts += self.retries
            yield
