"""Blocks computed by code that torch.compile makes once, for all blocks, steps and seeds. Knows no model.

Blocks are modules of one class, each with parameters of its own: code is made of a function of the module and its
inputs, so that neither which module it is nor where its parameters lie matters to it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map_only

from ..log import logger
from ..out_of_memory import shortage
from .compiled_attention import AttentionFailed, call_compiled, keep_attention
from .token_chunks import ChunkedTokens

INDUCTOR = "inductor"
# compilers whose code takes weights wherever they lie. CUDA graphs, which do not, are none of them
BACKENDS = (INDUCTOR, "aot_eager", "eager")
# the largest error of a block, beside its norm, where another result is allowed
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# torch keeps no more for one function; a run has one or two kinds of calls
MOST_TIMES = 8
_COMPARED_NUMBERS = 2**16  # at a time
_LONGEST_REASON = 200


@dataclass(frozen=True)
class CompileSettings:
    """exact: only the same bits will do; else errors up to TOLERANCES. backend: one of BACKENDS."""

    exact: bool = True
    backend: str = INDUCTOR

    @property
    def kind(self) -> str:
        """As plans have it."""
        return "exact" if self.exact else "not exact"


class CompiledBlocks:
    """The compiled code of one model's blocks, and what is known of it.

    Where the sizes of a call are new, its block is computed in both ways, and the results are compared, on the host.
    Where they differ by more than is allowed, or the compiler fails, blocks are computed as they are from then on, that
    one too; `why_not` and one line of the log say so.
    """

    def __init__(self, settings: CompileSettings) -> None:
        """Compiles nothing yet."""
        self.settings = settings
        self.times, self.seconds = 0, 0.0  # of compilations; and what the calls took that they were made in
        self.error = 0.0  # the largest that was found
        self.why_not = ""
        self._compared: set[Any] = set()
        # with code of its own: torch keeps by it what it compiles, and lets go of it together with this object
        run_block = FunctionType(_run_block.__code__.replace(), globals())
        self._run_block = torch.compile(run_block, backend=self._compile, dynamic=True)

    @property
    def kind(self) -> str:
        """As plans have it: whether what it computes is exact; empty where it is not used."""
        return "" if self.why_not else self.settings.kind

    def of(self, block: nn.Module) -> Any:
        """What stands for the block in a pass: called, it is computed by compiled code; all else is the block's."""
        return block if self.why_not else _Standing(block, self)

    def run(self, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the block answers. Raises what attention does, and where memory runs out."""
        sizes = _sizes(block, args, kwargs)
        new = sizes not in self._compared
        if new and self.times >= MOST_TIMES:
            self.give_up(f"the code was made {self.times} times already, for other kinds of calls")
        if self.why_not:
            return block(*args, **kwargs)
        expected = [part.cpu() for part in _tensors(block(*args, **kwargs))] if new else []
        try:
            with _copied(block):
                answer = self._call(block, *tree_map_only(Tensor, _rootless, (tuple(args), dict(kwargs))))
        except AttentionFailed as failed:
            raise failed.error from None
        except Exception as error:  # compilers fail in any way
            if shortage(error) is not None:
                raise
            self.give_up(f"torch.compile failed: {_in_short(error)}")
            return block(*args, **kwargs)
        if new and not self._is_as(expected, answer):
            del answer
            return block(*args, **kwargs)
        self._compared.add(sizes)
        return answer

    def _call(self, *args: Any) -> Any:
        times, begun = self.times, time.perf_counter()
        floats, sizes = torch._dynamo.config, torch.fx.experimental._config
        # sizes that are equal by chance do not stay so, and a layer's own numbers do not change
        with floats.patch(specialize_float=True), sizes.patch(use_duck_shape=False):
            try:
                return call_compiled(self._run_block, *args)
            finally:
                if self.times > times:
                    self.seconds += time.perf_counter() - begun

    def _compile(self, graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.times += 1
        keep_attention(graph)
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend(self.settings.backend)(graph, inputs)
        return compiled

    def _is_as(self, expected: Sequence[Tensor], answer: Any) -> bool:
        """Whether the answer may be used."""
        for own, part in zip(expected, _tensors(answer), strict=True):
            given = part.cpu()
            if torch.equal(own, given):
                continue
            error = _relative_error(given, own)
            if self.settings.exact:
                self.give_up(f"its results are not the same bits (error {error:.1g})")
                return False
            most = TOLERANCES[own.dtype]
            if not error <= most:
                self.give_up(f"its results are too far off (error {error:.1g}, at most {most:.1g})")
                return False
            self.error = max(self.error, error)
        return True

    def give_up(self, why: str) -> None:
        """From now on compute blocks as they are. Said once."""
        if self.why_not:
            return
        self.why_not = why
        logger.warning("Compiled code is not used: %s. Blocks are computed without it.", why)


class _Standing:
    def __init__(self, block: nn.Module, compiled: CompiledBlocks) -> None:
        self._block, self._compiled = block, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled.run(self._block, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


def _run_block(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return block(*args, **kwargs)


@contextmanager
def _copied(block: nn.Module) -> Iterator[None]:
    """Within it, what the block's modules were handed for this call, beside their parameters, are copies: code is made
    for the beginning of a tensor and for other places in it apart."""
    handed = [
        (module, name, value)
        for module in block.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    try:
        for module, name, value in handed:
            setattr(module, name, value.clone())
        yield
    finally:
        for module, name, value in handed:
            setattr(module, name, value)


def _rootless(tensor: Tensor) -> Tensor:
    """The same numbers, no view of another tensor: code is made for views and for others apart."""
    return tensor.data


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _sizes(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call's numbers may depend on beside its inputs and weights."""
    chunks = [child.chunk_tokens for child in block.children() if isinstance(child, ChunkedTokens)]
    inputs = [
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf is None
        for leaf in tree_leaves((tuple(args), dict(kwargs)))
    ]
    return type(block), *chunks, *inputs


def _relative_error(given: Tensor, expected: Tensor) -> float:
    pairs = zip(given.flatten().split(_COMPARED_NUMBERS), expected.flatten().split(_COMPARED_NUMBERS), strict=True)
    squares = torch.zeros(2, dtype=torch.float64)
    for own, other in pairs:
        wide = other.double()
        squares += torch.stack([(own.double() - wide).square().sum(), wide.square().sum()])
    difference, norm = squares.tolist()
    return float((difference / norm) ** 0.5) if norm else float(difference > 0)


def _in_short(error: BaseException) -> str:
    """Of the error in the compiler, which torch wraps."""
    while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
        error = inner
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__} {line}"[:_LONGEST_REASON].strip()
