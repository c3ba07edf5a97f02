"""Measure one row of `python dev.py bench streaming`, in a process of its own: its peaks are nobody else's."""

import json
import statistics
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from diffusers_step import DEVICE
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.runs.machine_speeds import measure_bus, measure_disk
from random_blocks import REAL_BLOCKS
from streaming_contenders import CONTENDERS, NotHere, synchronize
from streaming_job import Job, Tier, forget_files
from torch import Tensor


def measure(job: Job) -> tuple[dict[str, Any], Tensor]:
    """The figures of one way, for the whole model of 60 blocks, and its last prediction. Raises NotHere.

    `seconds` and `bytes_moved` are those of one step, and a step's part of what is done once. Peaks are as measured:
    growth of resident memory since before the model was opened, and the most that torch had allocated on the device.
    """
    torch.zeros(1, device=DEVICE)  # the device's own part of host memory is nobody's
    speeds = _speeds(job) if job.who == "resident" else {}
    seconds: list[float] = []
    with torch.no_grad(), RamWatch() as ram, CONTENDERS[job.who](job) as contender:
        prediction = contender.step(job.sigmas[0], False)
        before = replace(contender.moved())
        for turn in range(1, job.rounds + 1):
            if job.tier is Tier.DISK:
                forget_files(job)
            # from the disk each step stands alone: what is fetched ahead would be read between the clocks
            more = job.tier is Tier.RAM and turn < job.rounds
            start = time.perf_counter()
            prediction = contender.step(job.sigmas[turn], more)
            synchronize()
            seconds.append(time.perf_counter() - start)
        moved = contender.moved() - before
    times = REAL_BLOCKS / job.blocks
    once_bytes, once_seconds = contender.once_bytes * times, contender.once_seconds * times
    figures: dict[str, Any] = {
        "seconds": statistics.median(seconds) * times + once_seconds / job.steps,
        "best_seconds": min(seconds) * times + once_seconds / job.steps,
        "peak_vram_bytes": torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None,
        "peak_ram_bytes": ram.growth,
        "bytes_moved": round((moved.blocks * times + moved.others) / job.rounds + once_bytes / job.steps),
        "read_bytes": round(moved.read / job.rounds * times + once_bytes / job.steps),
        "once_bytes": round(once_bytes) or None,
        "once_seconds": once_seconds or None,
        "measured_seconds": statistics.median(seconds),
    }
    return figures | speeds, prediction.float().cpu()


class RamWatch:
    """`with RamWatch() as ram: ...` then `ram.growth`: the most that resident memory has grown by, in bytes."""

    def __init__(self) -> None:
        self.growth = 0
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "RamWatch":
        self._before = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.growth = max(self.growth, self._process.memory_info().rss - self._before)


def _speeds(job: Job) -> dict[str, float | None]:
    """GB per second to the device, and of the disk at its best: before a model maps the file, which would keep it
    in the cache."""
    hardware = Hardware.detect(DEVICE)
    weights = max(job.folder.iterdir(), key=lambda file: file.stat().st_size)
    disk = 0.0
    for _ in range(5):
        forget_files(job)
        disk = max(disk, measure_disk(weights))
    bus = None if hardware.host_device else measure_bus(hardware) / 1e9
    return {"bus_gb_s": bus, "disk_gb_s": disk / 1e9}


def main(job: Job, out: Path) -> None:
    """Write the figures, or the `error`, to `out`, and the prediction beside it."""
    if DEVICE.type == "cuda" and job.who != "resident":
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.vram_bytes / total))
    try:
        figures, prediction = measure(job)
    except NotHere as error:
        figures = {"error": str(error)}
    except torch.OutOfMemoryError:
        figures = {"error": "out of memory"}
    else:
        torch.save(prediction, out.with_suffix(".pt"))
    out.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main(Job.from_json(sys.argv[1]), Path(sys.argv[2]))
