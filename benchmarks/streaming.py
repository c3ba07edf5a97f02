"""One guided step of a transformer with blocks of the real size and random weights, larger than its memory limit.

    python dev.py bench streaming

Each row runs in a process of its own with the same weights, inputs and limits; `resident`, everything on the device,
has no limit. As many blocks are run as memory and disk hold (4 on a CPU), and the figures are those of all 60: what
the blocks took, so many times (`measured_seconds` is what the clock said). Weights that are not on the device wait in
RAM or on the disk, whose cache is emptied before each step.

`seconds` and `bytes_moved` are per step of a run of 20: ours computes its modulation table once per run, and a 20th of
that is in both. `seconds` is the median of the measured steps, `best_seconds` the fastest, which other programs on the
machine disturb least. `bytes_moved` counts weights at each framework's own onload call (on a CPU too, where an onload
copies nothing). `group_offload_ratio` is how many times fewer they are than with diffusers group offloading.
`bound_seconds` is the larger of computing (the step of `resident`) and bytes over measured bandwidth; `bound_ratio` is
the step against that, below 1 where less is computed: ours does without the modulation. Peaks are as measured: what
resident memory grew by, files that a framework maps included, and what torch allocated on the device. `difference` is
the largest from `resident`.

mmgp is no dependency, and runs where someone has put it: `pip install --no-deps --target CACHE/peers mmgp
optimum-quanto`, CACHE being the folder that dev.py sets things up in. It needs CUDA. Peers have no RAM limit to be
told; `peak_ram_bytes` shows what they take. The int8 case is compared with `resident` in bf16.

On a CPU the bytes are what counts: device and RAM are the same, and computing takes nearly all of the time.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from devtools.cache import cache_folder
from diffusers_step import DEVICE
from random_blocks import REAL_BLOCKS, Stored, write_transformer
from streaming_job import Job, Tier
from torch import Tensor

GIB = 1024**3
BLOCK_BYTES = 680_000_000  # in bf16
STEPS = 20
VRAM_BYTES = 4 * GIB
CPU_BLOCKS, QUICK_BLOCKS = 4, 2
ROW = Path(__file__).parents[1] / "tools" / "streaming_row.py"
PEERS = ("diffusers group offload", "accelerate sequential", "mmgp")


@dataclass(frozen=True)
class _Case:
    """What rows have in common. Peers that read no int8 file are not in its case."""

    tier: Tier
    stored: Stored
    ram_bytes: int | None
    whos: tuple[str, ...]

    def blocks(self, quick: bool) -> int:
        """How many fit, by what the peers need: page-locked copies that are rounded up to powers of two, or a copy of
        the file on the disk."""
        if quick or DEVICE.type == "cpu":
            return QUICK_BLOCKS if quick else CPU_BLOCKS
        in_ram, on_disk = (1.8, 1.0) if self.tier is Tier.RAM else (1.0, 2.0)
        ram = 0.85 * psutil.virtual_memory().available / (in_ram * BLOCK_BYTES)
        disk = 0.9 * shutil.disk_usage(_scratch()).free / (on_disk * BLOCK_BYTES)
        return max(QUICK_BLOCKS, min(REAL_BLOCKS, int(ram), int(disk)))

    def text(self, blocks: int, side: int, *, limited: bool) -> str:
        ram = "" if self.ram_bytes is None else f", {self.ram_bytes // GIB} GB RAM"
        limits = f"from {self.tier.value}, {VRAM_BYTES // GIB} GB VRAM{ram}" if limited else "no limit"
        return f"{side}x{side}, {self.stored.value}, {limits}, {blocks} of {REAL_BLOCKS} blocks run"


def rows(quick: bool) -> list[dict[str, Any]]:
    side = (128 if quick else 256) if DEVICE.type == "cpu" else 1328
    made: list[dict[str, Any]] = []
    resident: dict[str, Any] = {}
    for case in _cases():
        blocks = case.blocks(quick)
        measured = _measure(case, blocks, side, rounds=2 if quick else 5)
        resident = measured.get("resident", resident)
        group = measured.get("diffusers group offload", {}).get("bytes_moved")
        for who in case.whos:
            text = case.text(blocks, side, limited=who != "resident")
            made.append({"who": who, "case": text, **_row(measured[who], resident, group)})
    return made


def _cases() -> list[_Case]:
    if DEVICE.type == "cpu":
        return [_Case(Tier.DISK, Stored.BF16, None, ("ours", *PEERS, "resident"))]
    return [
        _Case(Tier.RAM, Stored.BF16, None, ("ours", *PEERS, "resident")),
        _Case(Tier.RAM, Stored.INT8, 14 * GIB, ("ours",)),
        _Case(Tier.DISK, Stored.BF16, None, ("ours", *PEERS)),
    ]


def _measure(case: _Case, blocks: int, side: int, *, rounds: int) -> dict[str, dict[str, Any]]:
    """Each way's figures; where it drew what `resident` did, with the difference."""
    measured = {}
    expected = None
    with tempfile.TemporaryDirectory(dir=_scratch()) as temporary:
        folder = Path(temporary)
        write_transformer(folder / "transformer", layers=blocks, stored=case.stored)
        for who in sorted(case.whos, key=lambda who: who != "resident"):
            (folder / "scratch").mkdir()
            job = Job(
                who=who,
                tier=case.tier,
                folder=folder / "transformer",
                scratch=folder / "scratch",
                blocks=blocks,
                width=side,
                height=side,
                vram_bytes=VRAM_BYTES,
                ram_bytes=case.ram_bytes,
                steps=STEPS,
                rounds=rounds,
            )
            print(f"{who}: {case.text(blocks, side, limited=who != 'resident')}", flush=True)
            measured[who], prediction = _run(job, folder)
            shutil.rmtree(folder / "scratch")
            if expected is None:
                expected = prediction
            elif prediction is not None:
                measured[who]["difference"] = float((prediction - expected).abs().max())
    return measured


def _run(job: Job, folder: Path) -> tuple[dict[str, Any], Tensor | None]:
    """The figures of a process of its own, or its `error`; and what it predicted."""
    out, prediction = folder / "row.json", folder / "row.pt"
    for file in (out, prediction):
        file.unlink(missing_ok=True)
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(_scratch() / "peers")])
    done = subprocess.run(
        [sys.executable, ROW, job.to_json(), out],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if not out.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"ended with {done.returncode}: {last:.200}"}, None
    figures: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return figures, torch.load(prediction) if prediction.exists() else None


def _row(figures: dict[str, Any], resident: dict[str, Any], group: int | None) -> dict[str, Any]:
    """What was measured, against its bound and against group offloading."""
    row = dict(figures)
    if "error" in figures:
        return row
    if group is not None and figures["bytes_moved"]:
        row["group_offload_ratio"] = group / figures["bytes_moved"]
    if "seconds" not in resident:
        return row
    bounds = {"computing": resident["seconds"], "disk": figures["read_bytes"] / (1e9 * resident["disk_gb_s"])}
    if resident["bus_gb_s"] is not None:
        bounds["bus"] = figures["bytes_moved"] / (1e9 * resident["bus_gb_s"])
    bound = max(bounds, key=lambda name: bounds[name])
    return row | {"bound": bound, "bound_seconds": bounds[bound], "bound_ratio": figures["seconds"] / bounds[bound]}


def _scratch() -> Path:
    """On a disk: the system's temporary folder may be memory."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
