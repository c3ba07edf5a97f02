"""Compiled blocks: made once for all blocks, steps and seeds, the same bits or not used, and nothing is lost where a
compiler fails. aot_eager needs no C++ compiler; inductor is tested where there is one."""

import gc
import logging
import shutil
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from branches_21 import make_branch as make_branch_21
from live_bytes import allocated_peak_bytes
from qwenimage_lowvram.engine.compute.attention import Attention, Operands, attention_by, torchs_own
from qwenimage_lowvram.engine.compute.attention_kernels import AttentionKernel
from qwenimage_lowvram.engine.compute.compilation import MOST_TIMES, CompiledBlocks, CompileSettings
from qwenimage_lowvram.engine.compute.token_chunks import ChunkedTokens, chunk_tokens
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.network import Hooked
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.qwen_image_21.transformer import QwenImage21Transformer
from qwenimage_lowvram.engine.planning.request import SamplingRequest
from small_transformer_21 import LAYERS, random_weights, write_file
from torch import Tensor, nn
from torch.nn import functional as F

from .test_transformer import BRANCHES, Tiny, make_branch, run

EXACT, CLOSE = CompileSettings(backend="aot_eager"), CompileSettings(exact=False, backend="aot_eager")


class SmallBlock(nn.Module):
    """Attention and an MLP, each added to what came in."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.joined = nn.Linear(16, 48)
        self.mlp = ChunkedTokens(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)))
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.joined(x).chunk(3, dim=-1))
        x = x + F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
        return x + self.mlp(x)


class Times(nn.Module):
    """A block of which each one is compiled apart."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) * self.factor


def numbers(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def is_same(compiled: CompiledBlocks, tokens: int, *args: Any, block: nn.Module | None = None) -> bool:
    block = block or SmallBlock()
    return torch.equal(compiled.of(block)(numbers(tokens), *args), block(numbers(tokens), *args))


@pytest.fixture(scope="module")
def compiled() -> CompiledBlocks:
    """By which one kind of call was compiled."""
    made = CompiledBlocks(EXACT)
    assert is_same(made, 7)
    return made


@pytest.mark.slow
def test_blocks_share_what_is_compiled_once(compiled: CompiledBlocks) -> None:
    times = compiled.times
    assert all(is_same(compiled, tokens, block=SmallBlock(seed)) for seed in (1, 2) for tokens in (7, 9, 16, 48))
    with torch.no_grad():
        view = numbers(7).flatten(0, 1)[None]  # as what a linear layer makes is one
        assert torch.equal(compiled.of(SmallBlock())(view), SmallBlock()(view))
    assert (compiled.times, compiled.why_not) == (times, "")
    assert compiled.seconds > 0


class Counting:
    """A kernel of another package: torch's, counted; raises once where that was asked for."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.calls, self._error = 0, error

    def lacks(self, operands: Operands) -> str:
        return ""

    def __call__(self, operands: Operands) -> Tensor:
        self.calls += 1
        if self._error is not None and self.calls > 1:
            raise self._error
        return torchs_own(operands)


@pytest.mark.slow
def test_attention_within_compiled_code_is_the_one_around_it(compiled: CompiledBlocks) -> None:
    kernel = Counting()
    with attention_by(Attention(AttentionKernel("counted"), kernel)):
        assert is_same(compiled, 7)
        assert is_same(compiled, 9)
    assert kernel.calls > 2
    before = kernel.calls
    with attention_by(Attention(AttentionKernel("counted"), kernel)):
        assert is_same(compiled, 7)
    assert kernel.calls == before + 2  # compiled, and as it is
    assert compiled.why_not == ""


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_an_interruption_in_compiled_code_is_one_and_the_code_is_used_again(compiled: CompiledBlocks) -> None:
    kernel = Counting(Interrupted())
    with pytest.raises(Interrupted), attention_by(Attention(AttentionKernel("counted"), kernel)), torch.no_grad():
        compiled.of(SmallBlock())(numbers(23))  # the first is of the block as it is
    assert kernel.calls == 2
    assert compiled.why_not == ""
    assert is_same(compiled, 23)


@pytest.mark.slow
def test_what_a_block_is_called_with_in_other_ways_is_compiled_once_more(compiled: CompiledBlocks) -> None:
    times, block = compiled.times, SmallBlock()
    assert all(is_same(compiled, tokens, torch.ones(1, 1, 1, tokens, dtype=torch.bool)) for tokens in (5, 9, 11))
    assert compiled.times == times + 1
    chunk_tokens(block, 5)
    assert all(is_same(compiled, tokens, block=block) for tokens in (8, 10, 9))  # two chunks
    assert compiled.times == times + 2


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """`instead(compiler)`: a stand-in for every compiler."""
    import torch._dynamo

    return lambda compiler: monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: compiler)


def fail(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler is found\nset CC")


def test_where_the_compiler_fails_blocks_are_computed_and_it_is_said_once(
    instead: Callable[[Callable[..., Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    instead(fail)
    compiled = CompiledBlocks(EXACT)
    with caplog.at_level(logging.WARNING):
        assert all(is_same(compiled, tokens) for tokens in (7, 7, 9))
    assert compiled.why_not == "torch.compile failed: RuntimeError no compiler is found"
    assert [record.getMessage() for record in caplog.records if "Compiled code" in record.getMessage()] == [
        f"Compiled code is not used: {compiled.why_not}. Blocks are computed without it."
    ]
    assert compiled.of(block := SmallBlock()) is block


def test_that_memory_ran_out_is_no_failure_of_the_compiler(instead: Callable[[Callable[..., Any]], None]) -> None:
    def exhaust(graph: Any, inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    instead(exhaust)
    compiled = CompiledBlocks(EXACT)
    with pytest.raises(Exception, match="out of memory"):
        is_same(compiled, 7)
    assert compiled.why_not == ""


def off_by(error: float) -> Callable[..., Any]:
    return lambda graph, inputs: lambda *args: [part * (1 + error) for part in graph(*args)]


@pytest.mark.parametrize(
    ("settings", "error", "used"), [(EXACT, 1e-6, False), (CLOSE, 1e-6, True), (CLOSE, 1e-3, False)]
)
def test_other_results_are_used_only_where_they_may_be_others(
    settings: CompileSettings, error: float, used: bool, instead: Callable[[Callable[..., Any]], None]
) -> None:
    instead(off_by(error))
    compiled = CompiledBlocks(settings)
    assert is_same(compiled, 7) is not used
    assert is_same(compiled, 7) is not used
    assert bool(compiled.why_not) is not used
    assert compiled.error == (pytest.approx(error, rel=0.2) if used else 0.0)


def test_sizes_that_were_not_compared_are_compared(instead: Callable[[Callable[..., Any]], None]) -> None:
    """Also where nothing is compiled again for them."""
    instead(lambda graph, inputs: lambda *args: [part + (part.shape[1] == 9) for part in graph(*args)])
    compiled = CompiledBlocks(EXACT)
    assert is_same(compiled, 7)
    assert compiled.why_not == ""
    assert is_same(compiled, 9)
    assert "not the same bits" in compiled.why_not


def test_what_would_be_compiled_again_and_again_is_not(instead: Callable[[Callable[..., Any]], None]) -> None:
    instead(lambda graph, inputs: graph.forward)
    compiled = CompiledBlocks(EXACT)
    for tokens in range(2, MOST_TIMES + 4):
        assert is_same(compiled, tokens, block=Times(tokens))
    assert compiled.times == MOST_TIMES
    assert "8 times" in compiled.why_not


# the models' blocks


@pytest.fixture(scope="module")
def transformer(tiny: Tiny) -> QwenImageTransformer:
    _, folder = tiny(torch.bfloat16)
    cpu = Hardware.detect(torch.device("cpu"))
    return QwenImageTransformer(open_checkpoint(folder), dtype=torch.bfloat16, hardware=cpu)


def run_21(transformer: QwenImage21Transformer, branches: Sequence[Any]) -> list[Tensor]:
    with transformer.session(slots=2) as session:
        return session.forward(branches)


def both(transformer: Any, pass_of: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """As it is, and compiled."""
    compiled, transformer.compiled = transformer.compiled, None
    plain = pass_of()
    transformer.compiled = compiled
    return plain, pass_of()


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_blocks_are_compiled_once_whatever_the_step_the_prompt_the_image_and_where_they_lie(
    transformer: QwenImageTransformer,
) -> None:
    transformer.compile_by(EXACT)
    compiled = transformer.compiled
    assert compiled is not None
    for resident in ((), (1, 3)):
        transformer.load(resident)
        for case in ("guidance", "references", "images of two sizes", "two timesteps"):
            branches = BRANCHES[case](torch.bfloat16)
            assert equal(*both(transformer, lambda branches=branches: run(transformer, branches)))
    assert (compiled.times, compiled.why_not) == (1, "")
    transformer.compile_by(EXACT)
    assert transformer.compiled is compiled

    def through_a_hook() -> list[Tensor]:
        with transformer.session(slots=2) as session:
            return session.forward(
                [make_branch(9, dtype=torch.bfloat16), make_branch(9, dtype=torch.bfloat16, timestep=0.3)],
                hooked=[Hooked(range(2), lambda index, states, temb, rotary, block: block(*states))],
            )

    assert equal(*both(transformer, through_a_hook))
    assert compiled.times <= 2  # parts of a batch
    assert compiled.why_not == ""


@pytest.mark.slow
def test_what_was_compiled_keeps_no_weights(tmp_path: Path) -> None:
    file = write_file(tmp_path / "model.safetensors", random_weights())
    cpu = Hardware.detect(torch.device("cpu"))
    transformer = QwenImage21Transformer(open_checkpoint(file), dtype=torch.float32, hardware=cpu)
    transformer.load([0])
    transformer.compile_by(EXACT)
    compiled, branches = transformer.compiled, [make_branch_21(n) for n in (13, 5)]
    assert compiled is not None
    assert equal(*both(transformer, partial(run_21, transformer, branches)))
    assert (compiled.times, compiled.why_not) == (1, "")
    slots = [weakref.ref(parameter) for parameter in transformer.store._tiers.module(0).parameters()]
    transformer.unload()
    del transformer
    gc.collect()
    assert [slot() for slot in slots] == [None] * len(slots)


@pytest.mark.slow
def test_a_plan_counts_what_compiled_code_holds(tmp_path: Path) -> None:
    """All chunks of an MLP at once, so that it is planned without; nothing in place; and the first result twice."""
    file = write_file(tmp_path / "model.safetensors", random_weights())
    cpu = Hardware.detect(torch.device("cpu"))
    transformer = QwenImage21Transformer(open_checkpoint(file), dtype=torch.float32, hardware=cpu)
    transformer.load(range(LAYERS))
    side = 64
    pass_of = partial(run_21, transformer, [make_branch_21(13, shape=(side, side))])
    pass_of()
    assert len(transformer.footprint.mlp_chunks) > 1
    transformer.compile_by(EXACT)
    assert transformer.footprint.mlp_chunks == (None,)
    planned = transformer.footprint.activation_bytes(SamplingRequest(side * 16, side * 16, 1, 13, token_px=16), None)
    first, again = allocated_peak_bytes(pass_of), allocated_peak_bytes(pass_of)
    assert 0.7 * planned < again <= first <= 1.02 * planned
    assert transformer.compiled is not None
    assert transformer.compiled.why_not == ""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_inductors_code_is_within_the_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled, block = CompiledBlocks(CompileSettings(exact=False)), Times(3)
    # quickly made: without vectors, and headers compiled beforehand, which pay for more code than this
    with (
        torch.no_grad(),
        inductor.patch({"cpp_cache_precompile_headers": False, "cpp.simdlen": 1, "compile_threads": 1}),
    ):
        pairs = [(compiled.of(block)(numbers(tokens)), block(numbers(tokens))) for tokens in (40, 50)]
    assert all((made - own).norm() < 1e-5 * own.norm() for made, own in pairs)
    assert (compiled.times, compiled.why_not) == (1, "")
