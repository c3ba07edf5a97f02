"""The passes of one run over a transformer's blocks: `for block: for branch`. Knows no network."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from ..compute.attention import attention_by
from ..compute.finite import is_finite
from ..compute.half_products import half_attention, measure_weights
from ..compute.token_chunks import chunk_tokens
from ..streaming import BlockStreamer, OnBlock, Waits
from .network import Branch, Gate, Hooked, State

if TYPE_CHECKING:
    from .streamed_transformer import StreamedTransformer

BranchT = TypeVar("BranchT", bound=Branch)
StateT = TypeVar("StateT", bound=State)


class TransformerSession(Generic[BranchT, StateT]):
    """The passes of one run. Made by `StreamedTransformer.session`."""

    def __init__(
        self,
        transformer: "StreamedTransformer[BranchT, StateT]",
        streamers: Sequence[BlockStreamer],
        mlp_chunk_tokens: int | None,
    ) -> None:
        self._transformer = transformer
        self._streamers = streamers
        self._mlp_chunk_tokens = mlp_chunk_tokens
        self.attention_notes = set[str]()  # what the kernel of attention did not compute, and why

    @property
    def waits(self) -> Waits:
        """How long compute has waited for blocks, by where they came from."""
        return sum((streamer.waits for streamer in self._streamers), Waits())

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
        in_half = transformer.products_dtype != transformer.dtype
        alone = set(range(len(states))).difference(*(group.branches for group in hooked))
        tokens = max((state.tokens for state in states.values()), default=0)

        def images() -> list[Tensor]:
            return [transformer.image_tokens(branches[i], state) for i, state in states.items()]

        before = [] if gate is None else images()
        for streamer in self._streamers:
            attention = transformer.attention_on(streamer.hardware)
            for state in states.values():
                state.move(streamer.device)
            for index, block in streamer.visit(more=more, may_end=gate is not None):
                if on_block is not None:
                    on_block(index)
                chunk_tokens(block, self._mlp_chunk_tokens)
                with ExitStack() as stack:
                    stack.enter_context(attention_by(attention, tokens, check, told=self.attention_notes.add))
                    if in_half:
                        stack.enter_context(half_attention())
                        measure_weights(block)
                    elif transformer.compiled is not None:
                        block = transformer.compiled.of(block)
                    for i in sorted(alone):
                        states[i].run(index, block)
                    for group in hooked:
                        transformer.run_hooked([states[i] for i in group.branches], group.hook, index, block)
                for state in states.values():
                    state.add_residuals(index)
                if gate is not None and before:
                    instead = gate.behind_first(before, images())
                    before.clear()
                    ended = {i: tokens for i, tokens in enumerate(instead) if tokens is not None}
                    answers |= {i: transformer.answer_of(branches[i], tokens) for i, tokens in ended.items()}
                    for i in ended:
                        del states[i]
                    alone &= states.keys()
                    if not states:
                        break
            if not states:
                break
        for state in states.values():
            state.move(transformer.hardware.device)
        last = images() if keep else []
        answers |= {i: transformer.finish(branches[i], states.pop(i)) for i in list(states)}
        return [answers[i] for i in range(len(branches))], last
