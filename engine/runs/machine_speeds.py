"""Measure a machine in under two seconds: matrix products, copies to the device, reads of a file, and exchanges with
other processes."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import distributed

from ..compute.half_products import activations_dtype, half_linear, largest_row
from ..compute.link import Link
from ..compute.stored_products import StoredProduct
from ..errors import DamagedFile
from ..files.json_texts import unreadable
from ..files.regular_file import open_regular
from ..hardware import Hardware
from ..streaming import PIECE_BYTES, RING_PIECES, PinnedMemory, StreamOrder

SECONDS_EACH = 0.4
MEASURING_BYTES = 512 * 1024**2  # on the device, and some to spare
# of an exchange between processes, which each has with all others together; and how many exchanges of nothing
EXCHANGED_BYTES, EMPTY_EXCHANGES = 8 * 1024**2, 8
# tokens, width, hidden width of the model's MLP; a CPU would take seconds for one
MLP_SHAPE, MLP_SHAPE_ON_HOST = (4096, 3072, 12288), (128, 1024, 4096)


@torch.no_grad()
def measure_flops(hardware: Hardware, dtype: torch.dtype, product: StoredProduct | None = None) -> float:
    """Floating-point operations per second of a product as the model's MLP has them; in fp16 between fp32. product: by
    which a weight as stored is multiplied."""
    tokens, width, hidden = MLP_SHAPE_ON_HOST if hardware.host_device else MLP_SHAPE
    a = torch.ones(tokens, width, dtype=activations_dtype(dtype), device=hardware.device)
    operations = 2.0 * tokens * width * hidden
    if product is not None:
        parts = product.some_parts(hidden, width, hardware.device)
        return _rate(operations, lambda: product(a, [*parts, *product.measured(a)], None), hardware)
    b = torch.ones(hidden, width, dtype=dtype, device=hardware.device)
    if a.dtype != b.dtype:
        largest = largest_row(b)
        return _rate(operations, lambda: half_linear(a, b, largest=largest), hardware)
    out = torch.empty(tokens, hidden, dtype=dtype, device=hardware.device)
    return _rate(operations, lambda: torch.mm(a, b.T, out=out), hardware)


@torch.no_grad()
def measure_bus(hardware: Hardware) -> float:
    """Bytes per second from host memory, page-locked where that is granted, to the device."""
    host = PinnedMemory(hardware).take(2 * PIECE_BYTES)
    out = torch.empty(2 * PIECE_BYTES, dtype=torch.uint8, device=hardware.device)
    return _rate(float(len(out)), lambda: out.copy_(host.data, non_blocking=host.pinned), hardware)


@torch.no_grad()
def measure_memory(hardware: Hardware) -> float:
    """Bytes per second of the device's memory that decoding reaches: numbers of one byte, written as bf16."""
    data = torch.ones(2 * PIECE_BYTES, dtype=torch.int8, device=hardware.device)
    out = torch.empty(len(data), dtype=torch.bfloat16, device=hardware.device)
    return _rate(float(data.nbytes + out.nbytes), lambda: out.copy_(data), hardware)


def measure_disk(file: Path) -> float:
    """Bytes per second of pieces all over the file, read by several threads at a time.

    Raises MissingFile where it cannot be read any more, DamagedFile where it is empty or no regular file.
    """
    try:
        rate = _disk_rate(file)
    except OSError as error:
        raise unreadable(file, error) from error
    if not rate:
        raise DamagedFile("{file} is empty. Download it again.", code="file.empty", file=file)
    return rate


def _disk_rate(file: Path) -> float:
    pieces = max(1, file.stat().st_size // PIECE_BYTES)
    stride = max(1, pieces // 61) | 1
    stop = time.perf_counter() + SECONDS_EACH

    def read(thread: int) -> int:
        done = 0
        buffer = memoryview(bytearray(min(PIECE_BYTES, file.stat().st_size)))
        with open_regular(file, buffering=0) as handle:
            for turn in range(thread, pieces, RING_PIECES):
                handle.seek(turn * stride % pieces * PIECE_BYTES)
                done += handle.readinto(buffer) or 0  # type: ignore[attr-defined]
                if time.perf_counter() > stop:
                    break
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(RING_PIECES) as readers:
        total = sum(readers.map(read, range(RING_PIECES)))
    return total / (time.perf_counter() - start)


@torch.no_grad()
def measure_link(device: torch.device, count: int) -> Link:
    """Between `count` processes of torch.distributed's default group, whose tensors are on `device`: each of them calls
    this. What the processes of one machine send at the same time shares its link, as it does in an image."""

    def seconds_of(nbytes: int) -> float:
        sent = torch.zeros(nbytes // count * count, dtype=torch.uint8, device=device)
        received, begun = torch.empty_like(sent), time.perf_counter()
        distributed.all_to_all_single(received, sent)
        received[-1].item()  # waits for the device
        return time.perf_counter() - begun

    seconds_of(EXCHANGED_BYTES)  # which connects them
    begin = min(seconds_of(count) for _ in range(EMPTY_EXCHANGES))
    moving = max(min(seconds_of(EXCHANGED_BYTES) for _ in range(2)) - begin, 1e-9)
    return Link(EXCHANGED_BYTES * (count - 1) / count / moving, begin)


def _rate(amount: float, action: Callable[[], object], hardware: Hardware) -> float:
    """`amount` per second of `action` on the device, after a first time that does not count."""
    order = StreamOrder(hardware)

    def seconds_of(count: int) -> float:
        action()  # the device is busy with it while it is given the others
        begun = order.compute_moment()
        for _ in range(count):
            action()
        if hardware.device.type == "mps":  # whose moments are the host's
            torch.mps.synchronize()
        return order.seconds_between(begun, order.compute_moment())

    seconds_of(1)
    count, seconds = 0, 0.0
    while seconds < SECONDS_EACH:
        seconds += seconds_of(4)
        count += 4
    return count * amount / seconds
