"""The passes of one run over a transformer's blocks: `for block: for branch`. Knows no network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..compute.attention import attention_by
from ..compute.finite import is_finite
from ..compute.half_products import half_attention, measure_weights
from ..compute.token_chunks import chunk_tokens
from ..errors import DeviceFailed
from ..hardware import Hardware
from ..streaming import BlockStreamer, OnBlock, Waits
from .branch_shares import shared_out
from .network import Branch, Gate, Hooked, State

if TYPE_CHECKING:
    from .streamed_transformer import StreamedTransformer

# of an error that CUDA, HIP or XPU reports
_OF_DRIVERS = ("CUDA error", "HIP error", "CUBLAS_STATUS", "CUDNN_STATUS", "UR error", "UR_RESULT_ERROR")

BranchT = TypeVar("BranchT", bound=Branch)
StateT = TypeVar("StateT", bound=State)


@dataclass(frozen=True)
class Seat:
    """A device that computes branches, `branches` of a pass as planned, and its MLPs in such chunks."""

    hardware: Hardware
    branches: int
    mlp_chunk_tokens: int | None


@dataclass(frozen=True)
class Part:
    """Neighbouring blocks, and who computes them: a streamer for several seats hands out one module for each."""

    streamer: BlockStreamer[Any, Any]
    seats: Sequence[Seat]


@contextmanager
def _failures_named(hardware: Hardware) -> Iterator[None]:
    """Raise DeviceFailed, or an OutOfMemoryError that says where, for what one of several devices failed at."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{hardware.device}: {error}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _OF_DRIVERS):
            raise
        raise DeviceFailed(
            "{device} failed while it computed its part of a step: {why}.\n\nWhat to do: restart ComfyUI, and choose "
            "another card than {device} as transformer_device in the loader.",
            code="run.device_failed",
            device=hardware.device,
            why=str(error).partition("\n")[0],
        ) from error


class TransformerSession(Generic[BranchT, StateT]):
    """The passes of one run. Made by `StreamedTransformer.session`."""

    def __init__(self, transformer: "StreamedTransformer[BranchT, StateT]", parts: Sequence[Part]) -> None:
        self._transformer = transformer
        self._parts = parts
        self.attention_notes = set[str]()  # what the kernel of attention did not compute, and why

    @property
    def waits(self) -> Waits:
        """How long compute has waited for blocks, by where they came from."""
        return sum((part.streamer.waits for part in self._parts), Waits())

    @torch.no_grad()
    def forward(
        self,
        branches: Sequence[BranchT],
        *,
        hooked: Sequence[Hooked] = (),
        more: bool = False,
        on_block: OnBlock | None = None,
        check: Callable[[], None] | None = None,
        keep: Callable[[Sequence[Tensor]], None] | None = None,
        gate: Gate | None = None,
    ) -> list[Tensor]:
        """What the model answers to each branch, in one pass over the blocks.

        `hooked`: branches with something around their blocks. `more`: another pass follows. `on_block` is called
        before each block with its index, `check` within those of huge images (`attention_by`); both may raise, and the
        session can be used again after that. `keep` is called behind the pass with the tokens of the image of each
        branch that came there, behind the last block. `gate`: which branches end behind the first block; where all do,
        the pass ends there, and `keep` is not called. No block behind it is fetched until one goes on, nor for the pass
        that follows. Where another package's kernel of
        attention makes numbers that are not finite, the pass is made again, and those that follow are made, by torch's
        own; to see that, the host waits for the device behind each pass. Raises what the network's `begin` does.
        """
        transformer = self._transformer
        options: dict[str, Any] = {
            "more": more,
            "on_block": on_block,
            "check": check,
            "keep": keep is not None,
            "gate": gate,
        }
        answers, hidden = self._forward(branches, hooked, **options)
        if transformer.attention_on(transformer.hardware).attend is not None and not all(map(is_finite, answers)):
            self.attention_notes.add(f"{transformer.attention.name} made numbers that are not finite")
            transformer.attend_by(None)
            answers, hidden = self._forward(branches, hooked, **options)
        if keep is not None and hidden:
            keep(hidden)
        return answers

    @torch.no_grad()
    def answers_of(self, branches: Sequence[BranchT], hidden: Sequence[Tensor]) -> list[Tensor]:
        """What the model answers to each branch where this comes out of the last block; no block is visited."""
        transformer = self._transformer
        transformer.return_outside()
        return [transformer.answer_of(branch, tokens) for branch, tokens in zip(branches, hidden, strict=True)]

    def _forward(
        self,
        branches: Sequence[BranchT],
        hooked: Sequence[Hooked],
        *,
        more: bool,
        on_block: OnBlock | None,
        check: Callable[[], None] | None,
        keep: bool,
        gate: Gate | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        transformer = self._transformer
        transformer.return_outside()  # it may have been asked to leave since the last pass
        states = dict(enumerate(transformer.begin(branches, on_block)))
        answers: dict[int, Tensor] = {}
        home = transformer.hardware.device
        tokens = max((state.tokens for state in states.values()), default=0)

        def images() -> list[Tensor]:
            return [transformer.image_tokens(branches[i], state).to(home) for i, state in states.items()]

        before = [] if gate is None else images()
        for part in self._parts:
            shares = shared_out(len(branches), [seat.branches for seat in part.seats], [g.branches for g in hooked])
            for seat, share in zip(part.seats, shares, strict=True):
                for i in share & states.keys():
                    states[i].move(seat.hardware.device)
            for index, found in part.streamer.visit(more=more, may_end=gate is not None):
                if on_block is not None:
                    on_block(index)
                blocks = found if len(part.seats) > 1 else (found,)
                for seat, share, block in zip(part.seats, shares, blocks, strict=True):
                    own = {i: states[i] for i in sorted(share & states.keys())}
                    groups = [group for group in hooked if share.issuperset(group.branches)]
                    with ExitStack() as stack:
                        if len(part.seats) > 1:
                            stack.enter_context(_failures_named(seat.hardware))
                        attention = transformer.attention_on(seat.hardware)
                        stack.enter_context(attention_by(attention, tokens, check, told=self.attention_notes.add))
                        self._run_block(seat, own, groups, index, block)
                for state in states.values():
                    state.add_residuals(index)
                if gate is not None and before:
                    instead = gate.behind_first(before, images())
                    before.clear()
                    ended = {i: tokens for i, tokens in enumerate(instead) if tokens is not None}
                    answers |= {i: transformer.answer_of(branches[i], tokens) for i, tokens in ended.items()}
                    for i in ended:
                        del states[i]
                    if not states:
                        break
            if not states:
                break
        for state in states.values():
            state.move(home)
        last = images() if keep else []
        answers |= {i: transformer.finish(branches[i], states.pop(i)) for i in list(states)}
        return [answers[i] for i in range(len(branches))], last

    def _run_block(
        self,
        seat: Seat,
        states: Mapping[int, StateT],
        hooked: Sequence[Hooked],
        index: int,
        block: nn.Module,
    ) -> None:
        """One seat's branches through block `index`."""
        transformer = self._transformer
        chunk_tokens(block, seat.mlp_chunk_tokens)
        with ExitStack() as stack:
            if transformer.products_dtype != transformer.dtype:
                stack.enter_context(half_attention())
                measure_weights(block)
            elif transformer.compiled is not None:
                block = transformer.compiled.of(block)
            together = {i for group in hooked for i in group.branches}
            for i, state in states.items():
                if i not in together:
                    state.run(index, block)
            for group in hooked:
                transformer.run_hooked([states[i] for i in group.branches], group.hook, index, block)
