"""Blocks come in order, whole, read once per pass, wherever they live; and nothing is left when a run has ended."""

import gc
import os
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.errors import DamagedFile, MissingFile
from qwenimage_lowvram.engine.files.checkpoint import TensorEntry, open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.streaming import (
    RING_PIECES,
    BlockStore,
    BlockStreamer,
    FileSource,
    PinnedMemory,
    StoredBlock,
    store_block,
    transfer,
)
from qwenimage_lowvram.engine.streaming.tiers import SlotModules
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

BLOCKS = 5
SLOW_SECONDS = 0.03
FORMATS = ["native", "fp8", "mixed"]
SUBSETS = list(chain.from_iterable(combinations(range(BLOCKS), n) for n in range(BLOCKS + 1)))
Weights = list[dict[str, Tensor]]


def make_block() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12, bias=False))


SHAPES = {name: tuple(p.shape) for name, p in make_block().named_parameters()}


def _write(folder: Path, storage: str) -> tuple[Path, Weights]:
    """A file of BLOCKS blocks and the bf16 weights that they have to arrive as. "mixed": some blocks are native."""
    generator = torch.Generator().manual_seed(0)
    stored, expected = {}, []
    for i in range(BLOCKS):
        weights = {}
        for name, shape in SHAPES.items():
            weight = torch.randn(shape, generator=generator)
            if storage == "fp8" or (storage == "mixed" and i % 2):
                scale = weight.abs().max() / 448
                if weight.ndim == 2:
                    data = (weight / scale).to(torch.float8_e4m3fn)
                    stored[f"{i}.{name}"] = data
                    stored[f"{i}.{name.removesuffix('.weight')}.scale_weight"] = scale
                    weights[name] = (data.float() * scale).bfloat16()
                    continue
            stored[f"{i}.{name}"] = weights[name] = weight.bfloat16()
        expected.append(weights)
    save_file(stored, folder / f"{storage}.safetensors")
    return folder / f"{storage}.safetensors", expected


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Weights]]:
    folder = tmp_path_factory.mktemp("blocks")
    return {storage: _write(folder, storage) for storage in FORMATS}


def stored_blocks(file: Path) -> list[StoredBlock]:
    tensors = open_checkpoint(file).tensors
    return [
        store_block(
            SHAPES,
            {name.removeprefix(f"{i}."): e for name, e in tensors.items() if name.startswith(f"{i}.")},
            torch.bfloat16,
            f"block {i}",
        )
        for i in range(BLOCKS)
    ]


def make_store(
    file: Path, hardware: Hardware, source: Callable[[Sequence[StoredBlock]], Any] = FileSource, **options: Any
) -> BlockStore:
    blocks = stored_blocks(file)
    return BlockStore(blocks, source(blocks), make_block, hardware, **options)


def is_whole(module: nn.Module, weights: dict[str, Tensor]) -> bool:
    parameters = dict(module.named_parameters())
    return parameters.keys() == weights.keys() and all(torch.equal(parameters[n], w) for n, w in weights.items())


def one_pass(streamer: BlockStreamer, expected: Weights, *, more: bool = False) -> None:
    indices = []
    for index, block in streamer.visit(more=more):
        indices.append(index)
        assert is_whole(block, expected[index])
    assert indices == list(range(BLOCKS))


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("qwen-block-reader")]


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("storage", FORMATS)
def test_every_pass_is_in_order_and_reads_each_streamed_block_once(
    storage: str, slots: int, hardware: Hardware, files: dict[str, tuple[Path, Weights]]
) -> None:
    file, expected = files[storage]
    store = make_store(file, hardware)
    for resident in SUBSETS:
        store.set_resident(resident)
        assert store.resident == set(resident)
        before, before_bytes = store.fetched_blocks, store.fetched_bytes
        with BlockStreamer(store, slots=slots) as streamer:
            for left in (2, 1, 0):
                one_pass(streamer, expected, more=left > 0)
        streamed = [i for i in range(BLOCKS) if i not in resident]
        assert store.fetched_blocks - before == 3 * len(streamed)
        assert store.fetched_bytes - before_bytes == 3 * sum(
            part.nbytes for i in streamed for param in store.blocks[i].params for part in param.parts
        )


@pytest.mark.parametrize("piece_bytes", [100, 256, 700])
@pytest.mark.parametrize("storage", FORMATS)
def test_blocks_arrive_whole_in_pieces_of_any_size(
    storage: str,
    piece_bytes: int,
    hardware: Hardware,
    files: dict[str, tuple[Path, Weights]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", piece_bytes)
    file, expected = files[storage]
    store = make_store(file, hardware)
    store.set_resident([1])
    store.set_held([3, 4])
    with BlockStreamer(store, slots=2) as streamer:
        for left in (2, 1, 0):
            one_pass(streamer, expected, more=left > 0)


@pytest.mark.parametrize("storage", FORMATS)
def test_held_blocks_are_read_once_and_then_come_from_host_memory(
    storage: str, hardware: Hardware, files: dict[str, tuple[Path, Weights]]
) -> None:
    file, expected = files[storage]
    store = make_store(file, hardware)
    store.set_resident([0])
    store.set_held([1, 3])
    for run in range(2):
        before = store.fetched_blocks
        with BlockStreamer(store, slots=2) as streamer:
            one_pass(streamer, expected, more=True)
            one_pass(streamer, expected)
        assert store.fetched_blocks - before == (6 if run == 0 else 4)  # 2 and 4 twice, 1 and 3 once in all
        assert store.held == {1, 3}
    store.release()
    assert store.held_bytes == sum(store.blocks[i].raw.nbytes for i in (1, 3))
    store.set_held([3])
    assert store.held == {3}
    store.set_held([])
    assert store.held_bytes == 0


class _SlowSource(FileSource):
    """A disk that takes its time."""

    def read(self, index: int, out: Tensor, start: int = 0) -> None:
        time.sleep(SLOW_SECONDS)
        super().read(index, out, start)


def test_waiting_for_the_file_and_for_held_blocks_are_told_apart(files: dict[str, tuple[Path, Weights]]) -> None:
    file, expected = files["native"]
    hardware = Hardware(torch.device("cpu"), streams=False, pinned=False, prefetch=True, host_device=True)
    store = make_store(file, hardware, source=_SlowSource)
    store.set_held([0, 1, 3])
    with BlockStreamer(store, slots=1) as streamer:
        one_pass(streamer, expected)
        first = streamer.waits
        one_pass(streamer, expected)
        second = streamer.waits - first
    assert first.bus_seconds == 0
    assert first.disk_seconds > 0.8 * 3 * SLOW_SECONDS  # those that will be held are read while others are
    assert second.disk_seconds > 0.8 * 2 * SLOW_SECONDS  # blocks 2 and 4
    assert 0 < second.bus_seconds < 2 * SLOW_SECONDS
    assert first.seconds == first.disk_seconds


# for the ring, and for two blocks of 1280 bytes
WITH_RING_BYTES = (RING_PIECES + 2) * 1280 + 100


class _Locks:
    """PageLocks that lock nothing, and note what they were asked for; they grant `grants` requests, of `room` bytes
    together, and give back `returns` times."""

    name = "Nobody"

    def __init__(self, grants: int = 100, room: int = 2**40, returns: int = 100) -> None:
        self.grants, self.room, self.returns = grants, room, returns
        self.locked: list[int] = []

    def has_room(self, nbytes: int) -> bool:
        return sum(self.locked) + nbytes <= self.room

    def lock(self, data: Tensor, device: torch.device) -> bool:
        self.grants -= 1
        if self.grants >= 0:
            self.locked.append(data.nbytes)
        return self.grants >= 0

    def unlock(self, data: Tensor, device: torch.device) -> bool:
        self.returns -= 1
        if self.returns >= 0:
            self.locked.remove(data.nbytes)
        return self.returns >= 0


def _locking(locks: _Locks, *, prefetch: bool = False, limit_bytes: int = 2**30) -> Hardware:
    return Hardware(
        torch.device("cpu"), False, True, prefetch, host_device=False, pinned_limit_bytes=limit_bytes, page_locks=locks
    )


@pytest.mark.parametrize("grants", [0, 1, 3, 100])
@pytest.mark.parametrize("prefetch", [False, True])
def test_memory_that_cannot_be_locked_still_holds_blocks(
    prefetch: bool, grants: int, files: dict[str, tuple[Path, Weights]], caplog: pytest.LogCaptureFixture
) -> None:
    file, expected = files["mixed"]
    locks = _Locks(grants)
    store = make_store(file, _locking(locks, prefetch=prefetch))
    store.set_held([0, 1, 2])
    with BlockStreamer(store, slots=2) as streamer:
        one_pass(streamer, expected, more=True)
        one_pass(streamer, expected)
    refused = [record for record in caplog.records if "refuses to page-lock" in record.message]
    assert len(refused) == (1 if grants < 4 else 0)  # said once, and not asked again
    assert store.pinned_bytes == sum(locks.locked)
    store.set_held([])
    assert locks.locked == []


def test_no_more_memory_is_locked_than_the_hardware_allows(files: dict[str, tuple[Path, Weights]]) -> None:
    _hold_all_within(_Locks(), WITH_RING_BYTES, files["native"])


def test_no_more_memory_is_locked_than_there_is_room_for_beside_others(
    files: dict[str, tuple[Path, Weights]], caplog: pytest.LogCaptureFixture
) -> None:
    _hold_all_within(_Locks(room=WITH_RING_BYTES), 2**30, files["native"])
    assert "refuses" not in caplog.text  # it was not asked


def _hold_all_within(locks: _Locks, limit_bytes: int, stored: tuple[Path, Weights]) -> None:
    """The ring is page-locked first: what is not has to pass it."""
    file, expected = stored
    store = make_store(file, _locking(locks, prefetch=True, limit_bytes=limit_bytes))
    store.set_held(range(BLOCKS))
    with BlockStreamer(store, slots=1) as streamer:
        for more in (True, False):
            one_pass(streamer, expected, more=more)
            assert sum(locks.locked) <= WITH_RING_BYTES
        assert len(locks.locked) == RING_PIECES + 2
    assert len(locks.locked) == 2
    assert store.held == set(range(BLOCKS))


@pytest.mark.parametrize("ring", [RING_PIECES, 9])
def test_a_ring_takes_as_many_buffers_as_it_has_pieces(ring: int, files: dict[str, tuple[Path, Weights]]) -> None:
    file, expected = files["native"]
    locks = _Locks()
    store = make_store(file, _locking(locks, prefetch=True))
    with BlockStreamer(store, slots=2, ring=ring) as streamer:
        for more in (True, True, True, False):
            one_pass(streamer, expected, more=more)
        assert len(locks.locked) == ring
        assert sum(locks.locked) == ring * store.ring_bytes // RING_PIECES
    assert not locks.locked


def test_memory_that_cannot_be_unlocked_is_told_and_stays_counted(caplog: pytest.LogCaptureFixture) -> None:
    locks = _Locks(returns=0)
    memory = PinnedMemory(_locking(locks, limit_bytes=3 * 2**20))
    assert memory.take(2 * 2**20).pinned  # given back at once
    assert "2 MB of RAM cannot be unlocked again" in caplog.text
    assert not memory.take(2 * 2**20).pinned
    assert memory.take(2**20).pinned


def test_a_pass_without_more_fetches_nothing_for_a_next_one(
    hardware: Hardware, files: dict[str, tuple[Path, Weights]]
) -> None:
    file, expected = files["native"]
    store = make_store(file, hardware)
    with BlockStreamer(store, slots=3) as streamer:
        one_pass(streamer, expected)
        assert store.fetched_blocks == BLOCKS
        one_pass(streamer, expected)
    assert store.fetched_blocks == 2 * BLOCKS


def test_blocks_that_stay_are_not_read_again(hardware: Hardware, files: dict[str, tuple[Path, Weights]]) -> None:
    store = make_store(files["fp8"][0], hardware)
    store.set_resident([0, 1, 2])
    store.set_resident([1, 2, 3])
    assert store.fetched_blocks == 4
    assert store.resident == {1, 2, 3}


def test_all_resident_needs_no_slot_and_reads_nothing(
    hardware: Hardware, files: dict[str, tuple[Path, Weights]]
) -> None:
    file, expected = files["native"]
    store = make_store(file, hardware)
    store.set_resident(range(BLOCKS))
    before = store.fetched_blocks
    with BlockStreamer(store, slots=0) as streamer:
        one_pass(streamer, expected)
        assert not readers()
    assert store.fetched_blocks == before


@pytest.mark.parametrize("storage", FORMATS)
def test_resident_blocks_keep_their_stored_size(
    storage: str, hardware: Hardware, files: dict[str, tuple[Path, Weights]]
) -> None:
    store = make_store(files[storage][0], hardware)
    store.set_resident(range(BLOCKS))
    assert store.resident_bytes == sum(block.raw.nbytes for block in store.blocks)
    for i, block in enumerate(store.blocks):
        assert block.native == (storage == "native" or (storage == "mixed" and i % 2 == 0))
        assert (store.module(i) is not None) == block.native
        if not block.native:
            weights = sum(p.shape[0] * p.shape[1] for p in block.params if len(p.shape) == 2)
            assert block.raw.nbytes < weights + 2000 < block.slot.nbytes + 2000


def test_blocks_that_left_the_device_find_a_slot_even_if_none_was_planned(
    hardware: Hardware, files: dict[str, tuple[Path, Weights]]
) -> None:
    file, expected = files["native"]
    store = make_store(file, hardware)
    with BlockStreamer(store, slots=0) as streamer:
        one_pass(streamer, expected)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_pass_that_found_no_memory_for_its_slots_is_followed_by_a_whole_one(
    fails_at: int,
    back: bool,
    hardware: Hardware,
    files: dict[str, tuple[Path, Weights]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`back`: the blocks that left the device are there again by then, so that the slots of before would do."""
    file, expected = files["native"]
    store = make_store(file, hardware)
    most = range(BLOCKS - 1)
    store.set_resident(most)
    new_slots, after_compute = store.new_slots, store.order.after_compute
    calls: list[str] = []

    def scarce() -> list[SlotModules]:
        calls.append("slot")
        if calls.count("slot") == fails_at:
            raise torch.OutOfMemoryError("out of memory")
        return new_slots()

    def noted() -> None:
        calls.append("after compute")
        after_compute()

    with BlockStreamer(store, slots=3) as streamer:
        one_pass(streamer, expected, more=True)
        store.set_resident([0])
        with monkeypatch.context() as change:
            change.setattr(store, "new_slots", scarce)
            change.setattr(store.order, "after_compute", noted)
            with pytest.raises(torch.OutOfMemoryError):
                next(streamer.visit())
            assert calls == ["slot"] * fails_at
            if back:
                change.undo()
                store.set_resident(most)
                change.setattr(store, "new_slots", scarce)
                change.setattr(store.order, "after_compute", noted)
            one_pass(streamer, expected, more=True)
            one_pass(streamer, expected)
        assert calls[fails_at:] == ["slot"] * (0 if back else 3 - fails_at) + ["after compute"]
        assert len(streamer._free) == (fails_at if back else 3)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("way", ["break", "exception"])
def test_a_pass_left_anywhere_is_followed_by_a_whole_one(
    way: str, more: bool, slots: int, hardware: Hardware, files: dict[str, tuple[Path, Weights]]
) -> None:
    file, expected = files["mixed"]
    store = make_store(file, hardware)
    for resident in [(), (0,), (2,), (4,), (0, 3), (1, 2, 3, 4)]:
        store.set_resident(resident)
        with BlockStreamer(store, slots=slots) as streamer:
            for last in range(BLOCKS):
                try:
                    for index, _ in streamer.visit(more=more):
                        if index == last:
                            if way == "break":
                                break
                            raise KeyError(index)
                except KeyError:
                    pass
                one_pass(streamer, expected, more=more)
        assert not readers()


class _FailsOnce:
    """The file's source, but for one read that fails."""

    def __init__(self, blocks: Sequence[StoredBlock], *, at: int) -> None:
        self._source = FileSource(blocks)
        self._at = at
        self._failed = False

    def read(self, index: int, out: Tensor, start: int = 0) -> None:
        if index == self._at and not self._failed:
            self._failed = True
            raise MissingFile("block {index} was on a disk that went away", code="test.gone", index=index)
        self._source.read(index, out, start)

    def close(self) -> None:
        self._source.close()


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("bad", range(BLOCKS))
def test_a_readers_error_comes_where_its_block_is_due_and_the_next_pass_is_whole(
    bad: int, slots: int, hardware: Hardware, files: dict[str, tuple[Path, Weights]]
) -> None:
    file, expected = files["mixed"]
    store = make_store(file, hardware, lambda blocks: _FailsOnce(blocks, at=bad))
    with BlockStreamer(store, slots=slots) as streamer:
        blocks = streamer.visit()
        for wanted in range(bad):
            index, block = next(blocks)
            assert index == wanted
            assert is_whole(block, expected[index])
        with pytest.raises(MissingFile, match=f"block {bad} was on a disk"):
            next(blocks)
        one_pass(streamer, expected)


@pytest.mark.parametrize("damage", ["cut off", "gone"])
@pytest.mark.parametrize("storage", ["native", "fp8"])
def test_a_file_that_changes_under_the_run_leaves_nothing_behind(
    storage: str, damage: str, hardware: Hardware, tmp_path: Path, open_handles: Callable[[Path], int]
) -> None:
    if damage == "gone" and os.name == "nt":
        pytest.skip("an open file cannot be removed there")
    file, _ = _write(tmp_path, storage)
    store = make_store(file, hardware)
    if damage == "cut off":
        last = min(part.offset for param in store.blocks[4].params for part in param.parts)
        os.truncate(file, last + 3)
    else:
        file.unlink()
    buffers: list[weakref.ref[Any]] = []

    def run() -> None:
        with BlockStreamer(store, slots=2) as streamer:
            try:
                for _, block in streamer.visit():
                    buffers.extend(weakref.ref(p) for p in block.parameters())
            finally:
                buffers.extend(weakref.ref(slot.place.buffer) for slot in streamer._free)

    gc.disable()  # what waits for it keeps its memory until then
    try:
        with pytest.raises(DamagedFile if damage == "cut off" else MissingFile, match=re.escape(str(file))) as caught:
            run()
        del caught
        assert not readers()
        store.release()
        assert buffers
        assert all(ref() is None for ref in buffers)
        assert open_handles(file) == 0
    finally:
        gc.enable()


def test_a_stopped_run_gives_everything_back(
    hardware: Hardware, files: dict[str, tuple[Path, Weights]], open_handles: Callable[[Path], int]
) -> None:
    file, _ = files["mixed"]
    store = make_store(file, hardware)
    store.set_resident([0, 1])
    refs: list[weakref.ref[Any]] = []

    def run() -> None:
        with BlockStreamer(store, slots=2) as streamer:
            for index, block in streamer.visit(more=True):
                refs.append(weakref.ref(block))
                refs.extend(weakref.ref(p) for p in block.parameters())
                if index == 3:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not readers()
    assert open_handles(file) == 0  # an open file could not be replaced on Windows
    store.release()
    assert store.resident_bytes == 0
    assert all(ref() is None for ref in refs)


def test_a_released_store_can_be_used_again(hardware: Hardware, files: dict[str, tuple[Path, Weights]]) -> None:
    file, expected = files["fp8"]
    store = make_store(file, hardware)
    for _ in range(2):
        store.set_resident([1])
        with BlockStreamer(store, slots=2) as streamer:
            one_pass(streamer, expected)
        store.release()


def test_buffers_made_in_inference_mode_can_be_written_by_the_reader(
    hardware: Hardware, files: dict[str, tuple[Path, Weights]]
) -> None:
    file, expected = files["mixed"]
    with torch.inference_mode():
        store = make_store(file, hardware)
        store.set_resident([0, 1])
        with BlockStreamer(store, slots=2) as streamer:
            one_pass(streamer, expected)


class _EmptySource:
    def __init__(self, blocks: Sequence[StoredBlock]) -> None:
        pass

    def read(self, index: int, out: Tensor, start: int = 0) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("resident", [(), (1,), (0, 1, 3), range(BLOCKS)])
def test_the_device_holds_slots_and_staging_and_residents_only(
    resident: Sequence[int], storage: str, slots: int, files: dict[str, tuple[Path, Weights]]
) -> None:
    gpu = Hardware(torch.device("cuda"), streams=False, pinned=False, prefetch=False, host_device=False)
    with FakeTensorMode(), LiveBytes("cuda") as live:
        store = make_store(files[storage][0], gpu, _EmptySource)
        store.set_resident(resident)
        held = live.now
        assert held == store.resident_bytes
        streamed = [i for i in range(BLOCKS) if store.module(i) is None]
        live.reset_peak()
        with BlockStreamer(store, slots=slots) as streamer:
            for more in (True, False):
                deque(streamer.visit(more=more), maxlen=0)
        needs_staging = any(not store.blocks[i].native and i not in resident for i in streamed)
        staging = store.staging_bytes if needs_staging else 0
        assert live.peak == held + min(slots, len(streamed)) * store.slot_bytes + staging
        assert live.now == held
        store.release()
        assert live.now == 0


def test_staging_holds_the_largest_stored_parameter(files: dict[str, tuple[Path, Weights]]) -> None:
    way = Hardware(torch.device("cpu"), streams=False, pinned=False, prefetch=False, host_device=False)
    assert make_store(files["native"][0], way).staging_bytes == 0
    assert make_store(files["fp8"][0], way).staging_bytes == 256 + 4  # 240 bytes of weight, aligned, and a scale


@dataclass(frozen=True)
class Addition:
    """A patch that adds `factor` times its part to a weight."""

    name: str
    parts: tuple[TensorEntry, ...]
    factor: float
    scratch_bytes: int = 480

    def apply(self, weight: Tensor, parts: Sequence[Tensor], scratch: Tensor) -> None:
        assert scratch.nbytes >= self.scratch_bytes
        sum_ = scratch[: 2 * weight.numel()].view(weight.dtype).view(weight.shape)
        torch.add(weight, parts[0], alpha=self.factor, out=sum_)
        weight.copy_(sum_)


def patched_blocks(file: Path, additions: Path, factor: float) -> list[StoredBlock]:
    """The blocks of `file`; to the first matrix of all but block 2, `factor` times one of `additions` is added."""
    tensors, added = open_checkpoint(file).tensors, open_checkpoint(additions).tensors
    return [
        store_block(
            SHAPES,
            {name.removeprefix(f"{i}."): e for name, e in tensors.items() if name.startswith(f"{i}.")},
            torch.bfloat16,
            f"block {i}",
            [Addition("0.weight", (added[f"{i}"],), factor)] if i != 2 else [],
        )
        for i in range(BLOCKS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("piece_bytes", [100, 2**20])
@pytest.mark.parametrize("storage", FORMATS)
def test_patches_are_applied_wherever_a_block_lives_and_leave_no_trace(
    storage: str,
    piece_bytes: int,
    hardware: Hardware,
    files: dict[str, tuple[Path, Weights]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", piece_bytes)
    file, plain = files[storage]
    added = {f"{i}": torch.randn(20, 12, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(BLOCKS)}
    save_file(added, tmp_path / "added.safetensors")
    store = make_store(file, hardware)

    def expected(factor: float) -> Weights:
        if not factor:
            return plain
        return [
            weights | ({"0.weight": torch.add(weights["0.weight"], added[f"{i}"], alpha=factor)} if i != 2 else {})
            for i, weights in enumerate(plain)
        ]

    for factor in (1.0, -2.5, 0.0):
        blocks = patched_blocks(file, tmp_path / "added.safetensors", factor) if factor else stored_blocks(file)
        store.replace(blocks, FileSource(blocks))
        for resident, held in (((), ()), ((0, 2), (1, 4)), (range(BLOCKS), ())):
            store.set_held(held)
            store.set_resident(resident)
            with BlockStreamer(store, slots=2) as streamer:
                one_pass(streamer, expected(factor), more=True)
                one_pass(streamer, expected(factor))


def test_another_strength_reads_no_block_again_that_is_still_encoded_or_held(
    hardware: Hardware, files: dict[str, tuple[Path, Weights]], tmp_path: Path
) -> None:
    file, _ = files["mixed"]
    save_file({f"{i}": torch.zeros(20, 12).bfloat16() for i in range(BLOCKS)}, tmp_path / "added.safetensors")
    store = make_store(file, hardware)
    reads = []
    for factor in (1.0, 2.0):
        blocks = patched_blocks(file, tmp_path / "added.safetensors", factor)
        store.replace(blocks, FileSource(blocks))
        before = store.fetched_blocks
        store.set_held([3, 4])
        store.set_resident([0, 1, 2])
        with BlockStreamer(store, slots=2) as streamer:
            deque(streamer.visit(), maxlen=0)
        reads.append(store.fetched_blocks - before)
    assert reads == [5, 1]  # of the resident ones, 0 is native and patched, 2 native and not patched, 1 encoded


@pytest.mark.slow
def test_blocks_may_be_taken_away_while_others_are_fetched_ahead(
    hardware: Hardware, files: dict[str, tuple[Path, Weights]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 100)
    file, expected = files["mixed"]
    for _ in range(15):
        store = make_store(file, hardware)
        store.set_resident([0, 1])
        store.set_held([2])
        with BlockStreamer(store, slots=2) as streamer:
            one_pass(streamer, expected, more=True)
            store.release()
            one_pass(streamer, expected, more=True)
            store.set_held([])
            store.set_resident([])
            one_pass(streamer, expected)


def test_a_block_that_moves_from_host_memory_to_the_device_is_not_read_again(
    hardware: Hardware, files: dict[str, tuple[Path, Weights]]
) -> None:
    store = make_store(files["mixed"][0], hardware)
    store.set_held([0, 1])
    with BlockStreamer(store, slots=2) as streamer:
        deque(streamer.visit(), maxlen=0)
    before = store.fetched_blocks
    store.set_resident([0, 1])
    store.set_held([])
    assert store.fetched_blocks == before
    assert store.resident == {0, 1}
    assert store.held_bytes == 0


class _NoMemory(PinnedMemory):
    """Has memory for one block, and for the small buffers of the ring."""

    def take(self, nbytes: int, *, spare_bytes: int = 0) -> Any:
        self.taken = getattr(self, "taken", 0) + nbytes
        if nbytes > 100 and self.taken > 2000:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 227 MB.")
        return super().take(nbytes, spare_bytes=spare_bytes)


def test_no_ram_for_a_block_costs_speed_and_not_the_run(
    hardware: Hardware,
    files: dict[str, tuple[Path, Weights]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 100)
    file, expected = files["native"]
    store = make_store(file, hardware, host=_NoMemory(hardware))
    store.set_held([0, 1, 2])
    with BlockStreamer(store, slots=2) as streamer:
        one_pass(streamer, expected, more=True)
        one_pass(streamer, expected)
    assert store.held == {0}
    assert [r.message for r in caplog.records if "no RAM for more than 1 held blocks" in r.message]


def test_the_log_says_which_blocks_came_and_left_and_what_a_pass_read(
    hardware: Hardware, files: dict[str, tuple[Path, Weights]], caplog: pytest.LogCaptureFixture
) -> None:
    file, expected = files["mixed"]
    store = make_store(file, hardware)
    with caplog.at_level("DEBUG", "qwen_lowvram"):
        store.set_resident([0, 2])
        loaded = store.resident_bytes
        store.set_held([1])
        with BlockStreamer(store, slots=2) as streamer:
            one_pass(streamer, expected, more=True)
            one_pass(streamer, expected)
            assert streamer.waits.seconds > 0
        store.set_held([])
        store.set_resident([2])
        kept = store.resident_bytes
        store.release()
    said = [record.getMessage().split("; waited")[0] for record in caplog.records]
    device = hardware.device
    first, second = ([1, 3, 4], [3, 4])
    nbytes = [sum(store.blocks[i].nbytes for i in read) for read in (first, second)]
    assert said == [
        f"resident blocks: [0, 2] came, [] left; now 2 of {BLOCKS}, {loaded} bytes",
        f"held blocks: 1 read into RAM; now 1, {store.blocks[1].raw.nbytes} bytes",
        f"pass on {device}: 3 blocks, 3 of them read from the file ({nbytes[0]} bytes)",
        f"pass on {device}: 3 blocks, 2 of them read from the file ({nbytes[1]} bytes)",
        "held blocks: [1] left RAM; now 0, 0 bytes",
        f"resident blocks: [] came, [0] left; now 1 of {BLOCKS}, {kept} bytes",
        f"resident blocks: [] came, [2] left; now 0 of {BLOCKS}, 0 bytes",
    ]


def test_the_log_says_nothing_unless_it_is_asked(
    hardware: Hardware, files: dict[str, tuple[Path, Weights]], caplog: pytest.LogCaptureFixture
) -> None:
    file, expected = files["native"]
    store = make_store(file, hardware)
    with caplog.at_level("INFO", "qwen_lowvram"):
        store.set_resident([0])
        with BlockStreamer(store, slots=2) as streamer:
            one_pass(streamer, expected)
            assert streamer.waits.seconds > 0
        store.release()
    assert not caplog.records


@pytest.mark.parametrize("resident", [(), (0,), (2,), (0, 1)])
def test_nothing_behind_the_first_block_is_fetched_before_it_is_asked_for(
    files: dict[str, tuple[Path, Weights]], hardware: Hardware, resident: Sequence[int]
) -> None:
    store = make_store(files["native"][0], hardware)
    store.set_resident(resident)
    first = int(0 not in resident)
    rest = BLOCKS - len(resident) - first
    with BlockStreamer(store, slots=2) as streamer:
        before, wanted = store.fetched_blocks, 0
        for ends in (True, False, True, True, False):
            passing = streamer.visit(more=True, may_end=True)
            index, _ = next(passing)
            time.sleep(0.02)  # in which a reader thread would be ahead
            wanted += first
            assert index == 0
            assert store.fetched_blocks - before == wanted
            if ends:
                passing.close()
                continue
            assert [index for index, _ in passing] == list(range(1, BLOCKS))
            time.sleep(0.02)
            wanted += rest + first
            assert store.fetched_blocks - before <= wanted
            wanted -= first  # of the pass that follows: fetched already
