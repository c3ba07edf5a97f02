"""The streamed transformer computes, bit for bit, what diffusers' own forward pass does, and reads no byte twice."""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import full_size
import pytest
import torch
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.errors import InvalidRequest
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.network import Hooked
from qwenimage_lowvram.engine.models.qwen_image import network
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.positions import MAX_POSITIONS
from qwenimage_lowvram.engine.models.qwen_image.schedule import qwen_sigmas
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer, TimestepRounding
from qwenimage_lowvram.engine.planning.spread import spread_order
from qwenimage_lowvram.engine.streaming import RING_PIECES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

LAYERS, TEXT_DIM = 5, 32
RESIDENT = [(), (0,), (1, 3), tuple(range(LAYERS))]
IMAGE = (1, 7, 9)  # odd counts of patches: where diffusers and ComfyUI place them differently
REFERENCES = ((1, 8, 12), (1, 3, 5))  # one larger than the image
Tiny = Callable[..., tuple[Any, Path]]


def make_branch(
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    references: Sequence[tuple[int, int, int]] = (),
    masked: int | None = None,
    timestep: float = 0.7,
    image: tuple[int, int, int] = IMAGE,
) -> Branch:
    """Random tokens and a random prompt of `length` tokens, of which those from `masked` on are masked."""
    generator = torch.Generator().manual_seed(length)
    shapes = (image, *references)
    mask = None if masked is None else (torch.arange(length) < masked)[None]
    return Branch(
        torch.randn(1, sum(f * h * w for f, h, w in shapes), 64, generator=generator).to(dtype),
        shapes,
        torch.randn(1, length, TEXT_DIM, generator=generator).to(dtype),
        mask,
        timestep,
    )


@torch.no_grad()
def diffusers_forward(model: Any, branch: Branch, residuals: Sequence[Tensor] | None = None) -> Tensor:
    """As the pipeline calls it: its timestep is cast to the latents' dtype, and then divided."""
    timestep = torch.tensor([branch.timestep]).mul(1000).to(branch.tokens.dtype) / 1000
    out = model(
        hidden_states=branch.tokens,
        encoder_hidden_states=branch.prompt_embeds,
        encoder_hidden_states_mask=branch.prompt_mask,
        timestep=timestep,
        img_shapes=[list(branch.shapes)],
        controlnet_block_samples=residuals,
        return_dict=False,
    )[0]
    frames, height, width = branch.shapes[0]
    return out[:, : frames * height * width]


def run(
    transformer: QwenImageTransformer,
    branches: Sequence[Branch],
    *,
    slots: int = 2,
    ring: int = RING_PIECES,
    chunk: int | None = None,
) -> Any:
    with transformer.session(slots=slots, ring=ring, mlp_chunk_tokens=chunk) as session:
        return session.forward(branches)


BRANCHES: dict[str, Callable[[torch.dtype], list[Branch]]] = {
    "one": lambda d: [make_branch(9, dtype=d)],
    "guidance": lambda d: [make_branch(13, dtype=d), make_branch(5, dtype=d)],
    "references": lambda d: [make_branch(n, dtype=d, references=REFERENCES) for n in (13, 5)],
    "one with a reference, one without": lambda d: [
        make_branch(13, dtype=d, references=REFERENCES[:1]),
        make_branch(5, dtype=d),
    ],
    "mask": lambda d: [make_branch(13, dtype=d, masked=8), make_branch(5, dtype=d, masked=5)],
    "images of two sizes": lambda d: [make_branch(6, dtype=d), make_branch(6, dtype=d, image=(1, 4, 10))],
    "two timesteps": lambda d: [make_branch(6, dtype=d), make_branch(6, dtype=d, timestep=0.3)],
}


def is_diffusers_own(
    case: str, dtype: torch.dtype, options: dict[str, Any], tiny: Tiny, hardware: Hardware, slots: Sequence[int]
) -> bool:
    """Whether every plan with these slots gives the result of diffusers' forward pass."""
    model, folder = tiny(dtype, **options)
    transformer = QwenImageTransformer(
        open_checkpoint(folder), dtype=dtype, hardware=hardware, rounding=TimestepRounding.DIFFUSERS
    )
    branches = BRANCHES[case](dtype)
    expected = [diffusers_forward(model, branch) for branch in branches]
    assert all(0.1 < e.float().std() < 10 for e in expected)
    equal = []
    for resident in RESIDENT:
        transformer.load(resident)
        for count in slots:
            result = run(transformer, branches, slots=count, ring=4 * count)
            equal += [torch.equal(r, e) for r, e in zip(result, expected, strict=True)]
    return all(equal)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"zero_cond_t": True}], ids=["base", "zero_cond_t"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BRANCHES)
def test_wherever_the_blocks_live_the_result_is_diffusers_own(
    case: str, dtype: torch.dtype, options: dict[str, Any], tiny: Tiny, cpu: Hardware
) -> None:
    assert is_diffusers_own(case, dtype, options, tiny, cpu, [2])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whatever_way_the_blocks_take_the_result_is_diffusers_own(
    dtype: torch.dtype, tiny: Tiny, hardware: Hardware
) -> None:
    assert is_diffusers_own("references", dtype, {"zero_cond_t": True}, tiny, hardware, [1, 2, 3])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residuals_are_added_where_diffusers_adds_them(dtype: torch.dtype, tiny: Tiny, hardware: Hardware) -> None:
    model, folder = tiny(dtype)
    transformer = QwenImageTransformer(
        open_checkpoint(folder), dtype=dtype, hardware=hardware, rounding=TimestepRounding.DIFFUSERS
    )
    transformer.load(RESIDENT[2])
    branch, plain = make_branch(13, dtype=dtype), make_branch(5, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    added = [torch.randn(1, branch.tokens.shape[1], 64, generator=generator).to(dtype) for _ in range(LAYERS)]
    expected = [diffusers_forward(model, branch, added), diffusers_forward(model, plain)]
    halves = tuple([part * residual for residual in added] for part in (0.25, 0.75))
    for residuals in ((added,), halves, ([None] * LAYERS, added), (added, [])):
        result = run(transformer, [replace(branch, residuals=residuals), plain])
        for made, wanted in zip(result, expected, strict=True):
            assert torch.equal(made, wanted) if residuals is not halves else torch.allclose(made, wanted, atol=0.1)
    assert not torch.equal(expected[0], run(transformer, [branch])[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hook_stands_around_every_block_of_its_branches_alone(
    dtype: torch.dtype, tiny: Tiny, hardware: Hardware
) -> None:
    model, folder = tiny(dtype, zero_cond_t=True)
    transformer = QwenImageTransformer(
        open_checkpoint(folder), dtype=dtype, hardware=hardware, rounding=TimestepRounding.DIFFUSERS
    )
    transformer.load(RESIDENT[1])
    branches = [make_branch(n, dtype=dtype, references=REFERENCES) for n in (9, 5)]
    branches.insert(1, replace(branches[0], tokens=branches[0].tokens.flip(1)))
    expected = [diffusers_forward(model, branch) for branch in branches]
    seen = []

    def watch(index: int, states: Any, temb: Tensor, rotary: Any, block: Any, change: float = 1.0) -> Any:
        img, txt = states
        seen.append((index, img.shape[0], txt.shape[:2], temb.shape[0], rotary[0].shape[0], rotary[1].shape[0]))
        img, txt = block(img, txt)
        img *= change
        return img, txt

    with transformer.session(slots=2) as session:
        result = session.forward(branches, hooked=[Hooked(range(2), watch)])
        changed = session.forward(branches, hooked=[Hooked(range(1, 2), partial(watch, change=1.01))])
    tokens = branches[0].tokens.shape[1]
    assert seen[:LAYERS] == [(i, 2, (2, 9), 4, tokens, 9) for i in range(LAYERS)]
    assert all(torch.equal(made, wanted) for made, wanted in zip(result, expected, strict=True))
    assert [torch.equal(made, wanted) for made, wanted in zip(changed, expected, strict=True)] == [True, False, True]


def test_attention_is_the_planned_one_whatever_diffusers_is_set_to(
    tiny: Tiny, cpu: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DIFFUSERS_ATTN_BACKEND sets it, and other packs: that kernel makes scores that no plan counts."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("another kernel than the planned one")

    model, folder = tiny(torch.float32)
    branch = make_branch(13)
    expected = diffusers_forward(model, branch)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName._NATIVE_MATH)
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, refuse)
    with pytest.raises(AssertionError, match="another kernel"):
        diffusers_forward(model, branch)
    transformer = QwenImageTransformer(
        open_checkpoint(folder), dtype=torch.float32, hardware=cpu, rounding=TimestepRounding.DIFFUSERS
    )
    transformer.load([])
    assert torch.equal(run(transformer, [branch])[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [64, 80, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_the_mlp_change_nothing(chunk: int, dtype: torch.dtype, tiny: Tiny, cpu: Hardware) -> None:
    model, folder = tiny(dtype)
    transformer = QwenImageTransformer(
        open_checkpoint(folder), dtype=dtype, hardware=cpu, rounding=TimestepRounding.DIFFUSERS
    )
    transformer.load([])
    branches = [make_branch(n, dtype=dtype, image=(1, 16, 20)) for n in (160, 5)]
    expected = [diffusers_forward(model, branch) for branch in branches]
    result = run(transformer, branches, chunk=chunk)
    assert all(torch.equal(r, e) for r, e in zip(result, expected, strict=True))


@pytest.mark.slow
def test_fp32_weights_computed_in_bf16_are_those_of_a_bf16_file(tiny: Tiny, hardware: Hardware) -> None:
    fp32, folder = tiny(torch.float32)
    transformer = QwenImageTransformer(
        open_checkpoint(folder), dtype=torch.bfloat16, hardware=hardware, rounding=TimestepRounding.DIFFUSERS
    )
    assert transformer.weight_format == "fp32"
    transformer.load([1, 2])
    branch = make_branch(9, dtype=torch.bfloat16)
    expected = diffusers_forward(copy.deepcopy(fp32).to(torch.bfloat16), branch)
    assert torch.equal(run(transformer, [branch])[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("branches", [1, 4])
@pytest.mark.parametrize("resident", RESIDENT)
def test_a_pass_fetches_each_streamed_block_once_for_any_number_of_branches(
    branches: int, resident: Sequence[int], tiny: Tiny, hardware: Hardware
) -> None:
    _, folder = tiny(torch.bfloat16)
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=torch.bfloat16, hardware=hardware)
    transformer.load(resident)
    before = transformer.store.fetched_blocks
    inputs = [make_branch(5 + i, dtype=torch.bfloat16) for i in range(branches)]
    visited: list[int] = []
    with transformer.session(slots=2) as session:
        for left in (2, 1, 0):
            session.forward(inputs, more=left > 0, on_block=visited.append)
    assert transformer.store.fetched_blocks - before == 3 * (LAYERS - len(resident))
    # the first pass went through the modulation weights too, as no timestep was announced
    assert visited == list(range(LAYERS)) * 4


@pytest.mark.slow
def test_exact_timesteps_are_closer_to_fp32_than_diffusers_rounded_ones(tiny: Tiny, cpu: Hardware) -> None:
    model, folder = tiny(torch.bfloat16)
    exact = copy.deepcopy(model).to(torch.float32)
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=torch.bfloat16, hardware=cpu)
    transformer.load(range(LAYERS))
    sigmas = qwen_sigmas(50, 83 * 83)[:-1].tolist()
    transformer.modulation.announce(sigmas)
    ours, theirs = [], []
    for sigma in sigmas[1::3]:
        branch = make_branch(9, dtype=torch.bfloat16, timestep=sigma)
        wanted = diffusers_forward(exact, make_branch_like(branch, torch.float32))
        ours.append((run(transformer, [branch])[0].float() - wanted).norm() / wanted.norm())
        theirs.append((diffusers_forward(model, branch).float() - wanted).norm() / wanted.norm())
    assert torch.stack(ours).mean() < 0.8 * torch.stack(theirs).mean()
    assert torch.stack(ours).max() < torch.stack(theirs).max()


def make_branch_like(branch: Branch, dtype: torch.dtype) -> Branch:
    return Branch(branch.tokens.to(dtype), branch.shapes, branch.prompt_embeds.to(dtype), None, branch.timestep)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"zero_cond_t": True}], ids=["base", "zero_cond_t"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_what_the_blocks_would_have_computed(
    dtype: torch.dtype, options: dict[str, Any], tiny: Tiny, hardware: Hardware
) -> None:
    model, folder = tiny(dtype, **options)
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=dtype, hardware=hardware)
    transformer.load([])
    timesteps = [1.0, 0.7321, 0.02]
    transformer.modulation.announce(timesteps)
    for timestep in timesteps:
        row = transformer.modulation.row(timestep)
        temb = transformer.embedding(timestep)
        assert temb.shape[0] == (2 if options else 1)
        with torch.no_grad():
            for i, block in enumerate(model.transformer_blocks):
                assert torch.equal(row.img[i], block.img_mod(temb))
                assert torch.equal(row.txt[i], block.txt_mod(temb[:1]))


def _modulation_bytes(folder: Path) -> int:
    tensors = open_checkpoint(folder).tensors
    return sum(e.nbytes for name, e in tensors.items() if "_mod.1." in name)


@pytest.mark.slow
def test_announced_timesteps_read_the_modulation_weights_once_and_a_second_run_none(
    tiny: Tiny, hardware: Hardware
) -> None:
    _, folder = tiny(torch.bfloat16)
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=torch.bfloat16, hardware=hardware)
    once = _modulation_bytes(folder)
    sigmas = qwen_sigmas(8, 4096)[:-1].tolist()
    for _ in range(2):
        transformer.load([0, 1])
        transformer.modulation.announce(sigmas)
        with transformer.session(slots=2) as session:
            for i, sigma in enumerate(sigmas):
                inputs = [make_branch(n, dtype=torch.bfloat16, timestep=sigma) for n in (9, 5)]
                session.forward(inputs, more=i < len(sigmas) - 1)
        transformer.unload()
        assert transformer.modulation.fetched_bytes == once


@pytest.mark.slow
def test_a_timestep_that_nobody_announced_costs_one_pass_once(tiny: Tiny, hardware: Hardware) -> None:
    _, folder = tiny(torch.float32)
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=torch.float32, hardware=hardware)
    transformer.load([])
    transformer.modulation.announce([0.9, 0.5])
    once = transformer.modulation.fetched_bytes
    assert once == _modulation_bytes(folder)
    announced = run(transformer, [make_branch(9, timestep=0.5)])
    assert transformer.modulation.fetched_bytes == once
    late = run(transformer, [make_branch(9, timestep=0.7), make_branch(5, timestep=0.7)])
    assert transformer.modulation.fetched_bytes == 2 * once
    again = run(transformer, [make_branch(9, timestep=0.7), make_branch(5, timestep=0.7)])
    run(transformer, [make_branch(9, timestep=0.9)])
    assert transformer.modulation.fetched_bytes == 2 * once
    assert torch.equal(late[0], again[0])
    assert not torch.equal(late[0], announced[0])


def test_rows_of_earlier_runs_are_forgotten_in_the_end(tiny: Tiny, cpu: Hardware) -> None:
    from qwenimage_lowvram.engine.planning.draft import SPARE_ROWS

    _, folder = tiny(torch.bfloat16)
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=torch.bfloat16, hardware=cpu)
    first = [i / 1000 for i in range(SPARE_ROWS)]
    transformer.modulation.announce(first)
    transformer.modulation.announce([0.9])
    before = transformer.modulation.fetched_bytes
    transformer.modulation.announce(first)
    assert transformer.modulation.fetched_bytes == before  # all that may be kept was kept
    transformer.modulation.announce([0.91, 0.92])
    transformer.modulation.announce(first)
    assert transformer.modulation.fetched_bytes > before


@pytest.mark.slow
def test_a_pass_over_the_modulation_weights_can_be_stopped_and_done_again(tiny: Tiny, hardware: Hardware) -> None:
    model, folder = tiny(torch.float32)
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=torch.float32, hardware=hardware)
    transformer.load([])

    def stop(index: int) -> None:
        if index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transformer.modulation.announce([0.7], on_block=stop)
    branch = make_branch(9)
    assert torch.equal(run(transformer, [branch])[0], diffusers_forward(model, branch))


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", range(LAYERS))
def test_a_session_goes_on_after_an_interrupted_pass(stop_at: int, tiny: Tiny, hardware: Hardware) -> None:
    model, folder = tiny(torch.float32)
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=torch.float32, hardware=hardware)
    transformer.load([1])
    transformer.modulation.announce([0.7])
    branches = [make_branch(9), make_branch(5)]

    def stop(index: int) -> None:
        if index == stop_at:
            raise KeyboardInterrupt

    with transformer.session(slots=2) as session:
        with pytest.raises(KeyboardInterrupt):
            session.forward(branches, more=True, on_block=stop)
        result = session.forward(branches)
    assert all(torch.equal(r, diffusers_forward(model, b)) for r, b in zip(result, branches, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [((1, 40, 60),), ((1, 4, 4), (1, 80, 12))])
def test_positions_beyond_the_tables_are_refused(
    shapes: tuple[tuple[int, int, int], ...], tiny: Tiny, cpu: Hardware
) -> None:
    _, folder = tiny(torch.bfloat16)
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=torch.bfloat16, hardware=cpu)
    transformer.load([])
    reach = max(max(h, w) // 2 for _, h, w in shapes)
    length = MAX_POSITIONS - reach
    tokens = torch.zeros(1, sum(h * w for _, h, w in shapes), 64, dtype=torch.bfloat16)
    embeds = torch.zeros(1, length + 1, TEXT_DIM, dtype=torch.bfloat16)
    with transformer.session(slots=1) as session:
        session.forward([Branch(tokens, shapes, embeds[:, :length], None, 0.5)])
        with pytest.raises(
            InvalidRequest, match=rf"The prompt has {length + 1} tokens.*positions for {length}\. Short"
        ):
            session.forward([Branch(tokens, shapes, embeds, None, 0.5)])


@pytest.mark.slow
def test_shrinking_gives_back_whole_blocks_and_the_result_stays(tiny: Tiny, hardware: Hardware) -> None:
    model, folder = tiny(torch.float32)
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=torch.float32, hardware=hardware)
    transformer.load(range(LAYERS))
    block = transformer.footprint.resident_block_bytes
    assert transformer.loaded_bytes == LAYERS * block + transformer.footprint.outside_bytes
    assert transformer.shrink(block + 1) == 2 * block
    assert transformer.store.resident == set(spread_order(LAYERS)[:3])
    branch = make_branch(9)
    assert torch.equal(run(transformer, [branch])[0], diffusers_forward(model, branch))
    assert transformer.shrink(100 * block) == 3 * block
    assert transformer.store.resident == frozenset()


def test_opening_reads_no_block(tiny: Tiny, cpu: Hardware) -> None:
    _, folder = tiny(torch.bfloat16)
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=torch.bfloat16, hardware=cpu)
    assert transformer.store.fetched_bytes == transformer.modulation.fetched_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_stays_on_the_device_after_unloading(stored: torch.dtype, stopped: bool) -> None:
    gpu = full_size.fake_gpu()
    with FakeTensorMode(), LiveBytes("cuda") as live, torch.inference_mode():
        transformer = QwenImageTransformer(
            full_size.transformer_checkpoint(stored, layers=3),
            dtype=torch.bfloat16,
            hardware=gpu,
            source=full_size.EmptySource,
        )
        assert live.now == 0

        def stop(index: int) -> None:
            if stopped and index == 2:
                raise KeyboardInterrupt

        def go() -> list[weakref.ref[Any]]:
            transformer.load([1])
            assert live.now == transformer.loaded_bytes
            transformer.modulation.announce([0.9])
            refs = []
            with transformer.session(slots=2) as session:
                refs.append(weakref.ref(session))
                branch = Branch(
                    torch.empty(1, 64, 64, device="cuda", dtype=torch.bfloat16),
                    ((1, 8, 8),),
                    torch.empty(1, 20, 3584, device="cuda", dtype=torch.bfloat16),
                    None,
                    0.9,
                )
                try:
                    session.forward([branch], on_block=stop)
                except KeyboardInterrupt:
                    assert stopped
            del branch
            assert live.now == transformer.loaded_bytes
            return refs

        for _ in range(2):
            refs = go()
            transformer.unload()
            assert transformer.store.resident_bytes == 0
            assert live.now == 0
            assert all(ref() is None for ref in refs)


def test_modules_that_another_thread_makes_meanwhile_have_weights(
    small_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan is made while a model runs: neither may change what the other makes."""
    made: list[str] = []
    diffusers_transformer = network.diffusers_transformer

    class Beside:
        QwenImageTransformerBlock = diffusers_transformer().QwenImageTransformerBlock

        @staticmethod
        def QwenImageTransformer2DModel(**config: Any) -> Any:
            other = Thread(target=lambda: made.append(torch.nn.LayerNorm(4).weight.device.type))
            other.start()
            other.join()
            return diffusers_transformer().QwenImageTransformer2DModel(**config)

    monkeypatch.setattr(network, "diffusers_transformer", lambda: Beside)
    QwenImageTransformer(
        open_checkpoint(small_pipeline / "transformer"),
        dtype=torch.float32,
        hardware=Hardware.detect(torch.device("cpu")),
    )
    assert set(made) == {"cpu"}
