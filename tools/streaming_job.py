"""What one process of `python dev.py bench streaming` measures, and what it counts. Starts nothing."""

import json
import os
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

import torch
from qwenimage_lowvram.engine.planning.request import SamplingRequest

PROMPT_TOKENS = (64, 8)


class Tier(Enum):
    """Where weights wait that are not on the device."""

    RAM = "RAM"
    DISK = "disk"


@dataclass(frozen=True)
class Job:
    """What one process measures. folder: of the transformer; scratch: an empty folder for copies that a peer makes.

    blocks: how many the folder has. width, height: of the image in px. vram_bytes bounds every way but `resident`;
    ram_bytes (None: no limit) only ours, which alone can be told. steps: of the run that what is done once is spread
    over; rounds: how many of them are measured.
    """

    who: str
    tier: Tier
    folder: Path
    scratch: Path
    blocks: int
    width: int
    height: int
    vram_bytes: int
    ram_bytes: int | None
    steps: int
    rounds: int

    @property
    def request(self) -> SamplingRequest:
        return SamplingRequest(self.width, self.height, 2, max(PROMPT_TOKENS), timesteps=self.steps)

    @property
    def sigmas(self) -> list[float]:
        """As bf16 has them: diffusers rounds them to it."""
        return torch.linspace(1, 1 / self.steps, self.steps).bfloat16().tolist()

    def to_json(self) -> str:
        paths = {"folder": str(self.folder), "scratch": str(self.scratch)}
        return json.dumps(asdict(self) | paths | {"tier": self.tier.value})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        given = json.loads(text)
        paths = {name: Path(given[name]) for name in ("folder", "scratch")}
        return cls(**given | paths | {"tier": Tier(given["tier"])})


@dataclass
class Moved:
    """Bytes of weights brought to the device: those of blocks, and others. read: of blocks, those that came
    from files."""

    blocks: int = 0
    others: int = 0
    read: int = 0

    def add(self, nbytes: int, *, in_block: bool, tier: Tier) -> None:
        if not in_block:
            self.others += nbytes
            return
        self.blocks += nbytes
        if tier is Tier.DISK:
            self.read += nbytes

    def __sub__(self, before: "Moved") -> "Moved":
        return Moved(self.blocks - before.blocks, self.others - before.others, self.read - before.read)


def forget_files(job: Job) -> None:
    """Have the system forget what it cached of the job's files, where it can be asked to: they are on the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in (*job.folder.iterdir(), *(path for path in job.scratch.rglob("*") if path.is_file())):
        handle = os.open(file, os.O_RDWR)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
