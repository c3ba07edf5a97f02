"""How many reads are under way at a time: as many as the ring has pieces, in every format, from the first read of a run
to its last; and what comes of those that were begun ahead."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.streaming import RING_PIECES, BlockStreamer
from torch import Tensor

from . import seams
from .device import SimulatedGPU
from .rig import Rig, finish
from .tiny_models import LAYERS, TinyModels

KINDS = ("bf16", "fp8", "scaled fp8", "int8", "nf4", "GGUF")
# what 32 MiB are of a block of the real size in its format: 453 MB in bf16, 227 in fp8 and int8, 120 in nf4 and GGUF
PART_OF_BLOCK = {"bf16": 0.074, "fp8": 0.148, "scaled fp8": 0.148, "int8": 0.148, "nf4": 0.28, "GGUF": 0.28}
SECONDS = 20.0


@contextmanager
def together(model: QwenImageTransformer, count: int) -> Iterator[Counter[tuple[int, int]]]:
    """Within it, a read of the model's blocks ends when `count` are under way. Gives how often each was read: by
    (block, first byte)."""
    source, barrier, seen = model.store.source, threading.Barrier(count), Counter[tuple[int, int]]()
    read = source.read

    def wait(index: int, out: Tensor, start: int = 0) -> None:
        seen[index, start] += 1
        barrier.wait(SECONDS)
        read(index, out, start)

    source.read = wait  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        source.read = read  # type: ignore[method-assign]


@contextmanager
def opened(models: TinyModels, kind: str, **changes: Any) -> Iterator[QwenImageTransformer]:
    with SimulatedGPU("late") as gpu:
        model = Rig(models, gpu, changes).transformer(kind)
        with seams.small_pieces(int(PART_OF_BLOCK[kind] * model.store.raw_bytes)):
            yield model
            finish(model)
        assert not gpu.races
        assert not len(gpu.page_locks)


@pytest.mark.parametrize("ring", [RING_PIECES, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_reads_are_under_way_as_the_ring_has_pieces(kind: str, ring: int, tiny_models: TinyModels) -> None:
    with opened(tiny_models, kind) as model, together(model, ring) as seen:
        with BlockStreamer(model.store, slots=2, ring=ring) as streamer:
            for left in reversed(range(ring)):  # so many passes have a multiple of it in reads
                assert [index for index, _ in streamer.visit(more=left > 0)] == list(range(LAYERS))
        assert model.store.fetched_blocks == ring * LAYERS
        assert set(seen.values()) == {ring}  # each byte once in each pass


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_blocks_that_will_be_held_are_read_the_same_way(kind: str, tiny_models: TinyModels) -> None:
    with opened(tiny_models, kind) as model, together(model, RING_PIECES) as seen:
        model.store.set_held(range(LAYERS - 1))  # the last one comes from the file
        with BlockStreamer(model.store, slots=2) as streamer:
            for left in (3, 2, 1, 0):
                assert [index for index, _ in streamer.visit(more=left > 0)] == list(range(LAYERS))
                if left == 3:
                    assert model.store.held == set(range(LAYERS - 1))
                    assert model.store.pinned_bytes == model.store.held_bytes
        pieces = len({start for _, start in seen})
        assert sum(seen.values()) == pieces * (LAYERS - 1 + 4)


def test_what_loads_is_read_ahead_across_blocks(tiny_models: TinyModels) -> None:
    with opened(tiny_models, "nf4") as model, together(model, RING_PIECES) as seen:
        model.store.set_resident(range(4))
        assert set(seen.values()) == {1}
        model.store.release()
