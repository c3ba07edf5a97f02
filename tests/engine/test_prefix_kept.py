"""Keys and values of prompts and references are made once and kept where the plan says, which changes no bit."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from branches_21 import make_branch, make_prefix
from qwenimage_lowvram.engine.compute.half_products import activations_dtype
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image_21.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image_21.transformer import QwenImage21Transformer
from qwenimage_lowvram.engine.planning.kept import NOTHING_KEPT, KeptTiers
from qwenimage_lowvram.engine.streaming.pinned_memory import HostBuffer
from qwenimage_lowvram.engine.streaming.ring import RING_PIECES
from small_transformer_21 import LAYERS, SMALL, random_weights, write_file
from torch import Tensor

from .conftest import WAYS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS = (0.9, 0.5, 0.1)
IMAGES, POSITIVE, NEGATIVE = 24 + 8 + 5, 13, 7  # tokens; the first with the text before the last image


class _Locks:
    def __init__(self) -> None:
        self.bytes = 0

    def has_room(self, nbytes: int) -> bool:
        return True

    def lock(self, data: Tensor, device: torch.device) -> bool:
        self.bytes += data.nbytes
        return True

    def unlock(self, data: Tensor, device: torch.device) -> bool:
        self.bytes -= data.nbytes
        return True


@pytest.fixture
def locks() -> _Locks:
    return _Locks()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    folder = tmp_path_factory.mktemp("small")
    weights = random_weights()
    return {
        dtype: write_file(folder / f"{dtype}.safetensors", {name: w.to(dtype) for name, w in weights.items()})
        for dtype in DTYPES
    }


def opened(files: dict[torch.dtype, Path], dtype: torch.dtype, hardware: Hardware) -> QwenImage21Transformer:
    return QwenImage21Transformer(open_checkpoint(files[dtype]), dtype=dtype, hardware=hardware)


def tiers(remade: int, on_device: int, *, dtype: torch.dtype = torch.float32, spare: int = 0) -> KeptTiers:
    """With room for both prompts and the images of `guided`."""
    tokens = IMAGES + POSITIVE + NEGATIVE
    factors = 3 * 4 if dtype == torch.float16 else 0
    return KeptTiers(LAYERS, remade, on_device, 2 * tokens * SMALL.inner_dim * dtype.itemsize + factors, spare)


def guided(
    timestep: float = 0.7, *, dtype: torch.dtype = torch.float32, prompt: int = 0, noise: int = 0, **shape: Any
) -> list[Branch]:
    """A positive and a negative prompt about two images."""
    return [
        replace(
            make_branch(1, dtype=dtype, seed=noise, timestep=timestep, **shape),
            prefix=make_prefix(length, dtype=dtype, references=2, seed=prompt),
        )
        for length in (POSITIVE, NEGATIVE)
    ]


def run(transformer: QwenImage21Transformer, kept: KeptTiers, passes: Sequence[Sequence[Branch]]) -> list[Tensor]:
    transformer.load((1,), (), (), kept)
    with transformer.session(slots=2) as session:
        return [answer for branches in passes for answer in session.forward(branches)]


def work(transformer: QwenImage21Transformer, kept: KeptTiers, passes: Sequence[Sequence[Branch]]) -> int:
    before = transformer.store.kept.made_tokens
    run(transformer, kept, passes)
    return transformer.store.kept.made_tokens - before


# every way to a slot in bf16; other dtypes keep other bytes, whichever way a block comes
CASES = [(way, torch.bfloat16) for way in WAYS] + [("straight", torch.float32), ("staged", torch.float16)]


@pytest.mark.parametrize(
    ("hardware", "dtype"), [(WAYS[way], dtype) for way, dtype in CASES], indirect=["hardware"], ids=str
)
def test_kept_anywhere_or_made_anew_the_images_are_the_same_bits(
    dtype: torch.dtype, files: dict[torch.dtype, Path], hardware: Hardware
) -> None:
    passes = [guided(step, dtype=activations_dtype(dtype)) for step in STEPS]
    expected = run(opened(files, dtype, hardware), NOTHING_KEPT, passes)
    for remade, on_device in [(0, 0), (0, 2), (2, 2), (LAYERS - 1, 1), (LAYERS, 0)]:
        kept = tiers(remade, on_device, dtype=dtype)
        transformer = opened(files, dtype, hardware)
        for _ in range(2):  # the second with what the first has left
            ours = run(transformer, kept, passes)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        assert transformer.store.kept.resident_bytes == on_device * kept.block_bytes
        assert 0 <= transformer.store.kept.held_bytes - kept.in_host * kept.block_bytes <= kept.in_host * 3 * 512
    assert work(opened(files, dtype, hardware), NOTHING_KEPT, passes) == 3 * LAYERS * (IMAGES + POSITIVE + NEGATIVE)


def test_a_prefix_runs_through_each_block_once_in_all_steps_and_seeds(
    files: dict[torch.dtype, Path], hardware: Hardware
) -> None:
    transformer, every = opened(files, torch.float32, hardware), IMAGES + POSITIVE + NEGATIVE
    assert work(transformer, tiers(0, 2), [guided(step) for step in STEPS]) == LAYERS * every
    assert work(transformer, tiers(0, 2), [guided(step, noise=1, shape=(4, 6)) for step in STEPS]) == 0
    # of which the beginning is made anew
    assert work(transformer, tiers(2, 0), [guided(step, noise=2) for step in STEPS]) == 3 * 2 * every


def test_another_instruction_for_the_same_images_runs_the_text_alone(
    files: dict[torch.dtype, Path], hardware: Hardware
) -> None:
    passes = [guided(step, prompt=1) for step in STEPS]
    expected = run(opened(files, torch.float32, hardware), NOTHING_KEPT, passes)
    transformer = opened(files, torch.float32, hardware)
    run(transformer, tiers(0, 2), [guided()])
    assert work(transformer, tiers(0, 2), passes) == LAYERS * (POSITIVE + NEGATIVE)
    ours = run(transformer, tiers(0, 2), passes)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    # prompts that nobody asked for any more made room
    assert (
        transformer.store.kept.resident_bytes + transformer.store.kept.held_bytes
        < (LAYERS + 1) * tiers(0, 0).block_bytes
    )


def test_other_weights_make_all_anew(files: dict[torch.dtype, Path], cpu: Hardware) -> None:
    transformer = opened(files, torch.float32, cpu)
    run(transformer, tiers(0, 2), [guided()])
    transformer.store.kept.forget()
    assert work(transformer, tiers(0, 2), [guided()]) == LAYERS * (IMAGES + POSITIVE + NEGATIVE)


class _Stopped(Exception):
    pass


def test_a_first_step_that_was_stopped_is_made_again_from_its_beginning(
    files: dict[torch.dtype, Path], hardware: Hardware
) -> None:
    passes = [guided(step) for step in STEPS]
    expected = run(opened(files, torch.float32, hardware), NOTHING_KEPT, passes)
    transformer = opened(files, torch.float32, hardware)
    transformer.load((1,), (), (), tiers(0, 2))

    def stop(index: int) -> None:
        if index == 3:
            raise _Stopped

    with transformer.session(slots=2) as session:
        with pytest.raises(_Stopped):
            session.forward(passes[0], on_block=stop)
        ours = [answer for branches in passes for answer in session.forward(branches)]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_what_has_to_leave_the_device_goes_to_spare_memory_or_is_made_again(
    files: dict[torch.dtype, Path], hardware: Hardware
) -> None:
    every = LAYERS * (IMAGES + POSITIVE + NEGATIVE)
    transformer = opened(files, torch.float32, hardware)
    spare = tiers(0, LAYERS, spare=2 * LAYERS * tiers(0, 0).block_bytes)
    expected = run(transformer, spare, [guided()])
    transformer.unload()
    assert transformer.store.kept.resident_bytes == 0
    assert transformer.store.held_bytes > 0
    assert work(transformer, spare, [guided(0.3)]) == 0
    assert transformer.store.kept.held_bytes == 0  # it went back
    assert all(torch.equal(a, b) for a, b in zip(run(transformer, spare, [guided()]), expected, strict=True))
    run(transformer, tiers(0, LAYERS), [guided()])
    transformer.unload()
    assert transformer.store.held_bytes == 0
    assert work(transformer, tiers(0, LAYERS), [guided()]) == every
    run(transformer, tiers(0, 0), [guided()])
    transformer.store.leave_host()
    assert transformer.store.held_bytes == 0
    assert work(transformer, tiers(0, 0), [guided()]) == every


def test_what_waits_in_ram_for_the_device_stays_within_what_a_later_plan_spares(
    files: dict[torch.dtype, Path], hardware: Hardware
) -> None:
    block = tiers(0, 0).block_bytes + 3 * 512  # each tensor lies aligned
    roomy = tiers(0, LAYERS, spare=LAYERS * block)
    transformer, every = opened(files, torch.float32, hardware), IMAGES + POSITIVE + NEGATIVE
    expected = run(transformer, roomy, [guided()])
    transformer.unload()
    assert transformer.store.kept.held_bytes > 4 * tiers(0, 0).block_bytes
    tight = tiers(0, LAYERS, spare=2 * block)
    transformer.load((1,), (), (), tight)
    assert transformer.store.kept.held_bytes <= 2 * block
    before = transformer.store.kept.made_tokens
    assert all(torch.equal(a, b) for a, b in zip(run(transformer, tight, [guided()]), expected, strict=True))
    assert 0 < transformer.store.kept.made_tokens - before <= (LAYERS - 1) * every  # the last blocks' were still there
    for _ in range(3):  # whether a run takes it back to the device or not
        transformer.unload()
        transformer.load((), (), (), tight)
        transformer.unload()
        assert transformer.store.kept.held_bytes <= 2 * block


@pytest.mark.parametrize("kept_blocks", [0, 2, LAYERS])
def test_page_locked_memory_is_left_to_what_blocks_pass_through(
    kept_blocks: int, files: dict[torch.dtype, Path], locks: _Locks
) -> None:
    block = 2 * (IMAGES + POSITIVE + NEGATIVE) * SMALL.inner_dim * 4 + 3 * 512
    plain = Hardware.detect(torch.device("cpu"))
    ring_bytes = opened(files, torch.float32, replace(plain, host_device=False)).store.ring_bytes
    limit = ring_bytes + kept_blocks * block
    hardware = replace(plain, host_device=False, pinned=True, pinned_limit_bytes=limit, page_locks=locks)
    transformer = opened(files, torch.float32, hardware)
    transformer.store.ring_pieces = RING_PIECES
    kept = transformer.store.kept
    # where all blocks stay on the device, none passes through anything; in the next run all do
    for resident in (range(LAYERS), ()):
        transformer.load(resident, (), (), tiers(0, 0))
        with transformer.session(slots=1) as session:
            for step in STEPS:
                session.forward(guided(step), more=True)
                assert locks.bytes <= limit
            assert kept.pinned_bytes <= kept_blocks * block
            assert kept.pinned_bytes >= max(0, kept_blocks - 1) * tiers(0, 0).block_bytes
            assert kept.held_bytes >= LAYERS * tiers(0, 0).block_bytes  # all of it stays, locked or not
            passing = 0 if resident else ring_bytes
            assert locks.bytes == passing + kept.pinned_bytes  # all that blocks pass through is locked
    assert kept.pinned_bytes == locks.bytes


def test_no_more_is_kept_than_was_planned(files: dict[torch.dtype, Path], cpu: Hardware) -> None:
    transformer = opened(files, torch.float32, cpu)
    small = replace(tiers(0, 2), block_bytes=tiers(0, 2).block_bytes // 2)
    for prompt in range(3):
        run(transformer, small, [guided(prompt=prompt)])
        held = transformer.store.kept.resident_bytes + transformer.store.kept.held_bytes
        assert held <= LAYERS * (small.block_bytes + 3 * 512)


class _LittleMemory:
    def __init__(self, buffers: int) -> None:
        self._left = buffers

    def take(self, nbytes: int, *, spare_bytes: int = 0) -> HostBuffer:
        self._left -= 1
        if self._left < 0:
            raise MemoryError("no more")
        return HostBuffer(torch.empty(nbytes, dtype=torch.uint8), pinned=False)


def test_a_system_without_memory_for_it_makes_it_anew(
    files: dict[torch.dtype, Path], hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [guided(step) for step in STEPS]
    expected = run(opened(files, torch.float32, hardware), NOTHING_KEPT, passes)
    transformer = opened(files, torch.float32, hardware)
    monkeypatch.setattr(transformer.store.kept, "_memory", _LittleMemory(4))
    ours = run(transformer, tiers(0, 0), passes)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert transformer.store.kept.held_bytes
