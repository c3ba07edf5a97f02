"""The parts of a run, most telling first, each until its time is over. Starts processes, measures nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .cases import COMFYUI, KITCHEN, STORED, STORED_ATTENTION, STORED_LORA, Case, Sizes, cases
from .deadline import Deadline
from .own_tests import results
from .report import NOT_REACHED, Report
from .worker import CutOff, JobFailed, Worker

Row = dict[str, Any]
# of the whole time, at most
ASSUMPTIONS_PART, TESTS_PART = 0.15, 0.25
LEAST_SECONDS = 10  # a row that has less is not begun


@dataclass(frozen=True)
class Setting:
    """What all parts need to know. cuda: whether there is a CUDA device; device: what blocks run on."""

    repository: Path
    scratch: Path
    environment: Mapping[str, str]
    comfyui: Path | None
    sizes: Sizes
    device: str
    cuda: bool
    absent: Sequence[str]

    @property
    def log(self) -> Path:
        return self.scratch / "log.txt"


def run_all(setting: Setting, report: Report, seconds: float) -> None:
    deadline = Deadline(seconds)
    with Worker(setting.environment, setting.log) as worker:
        for job, title in (("assumptions", "assumptions of the simulated GPU"), ("numbers", "numbers of the card")):
            rows = report.add(title)
            print(title, flush=True)
            if not setting.cuda:
                report.say(rows, {"case": "all", "status": "skipped", "why": "no CUDA device"})
                continue
            until = Deadline(seconds * ASSUMPTIONS_PART, behind=deadline)
            _told(report, rows, partial(worker.rows, {"do": job}, until))
    rows = report.add("tests/gpu")
    print("tests/gpu", flush=True)
    missing = [name for name in ("pytest", "diffusers", "accelerate", "psutil") if name in setting.absent]
    if not setting.cuda or missing:
        why = "no CUDA device" if not setting.cuda else f"needs {', '.join(missing)}"
        report.say(rows, {"case": "all", "status": "skipped", "why": why})
    else:
        until = Deadline(seconds * TESTS_PART, behind=deadline)
        _told(report, rows, lambda: results(setting.repository, setting.environment, setting.log, until))
    rows = report.add("steps of real-size blocks")
    print("steps of blocks", flush=True)
    _steps(setting, report, rows, deadline)


def _told(report: Report, rows: list[Row], make: Callable[[], Iterator[Row]]) -> None:
    """Add what comes. The names of all that is to come come first: where it ends early, they are told."""
    left: list[str] = ["all"]
    try:
        for row in make():
            if "names" in row:
                left = list(row["names"])
                continue
            if row["case"] in left:
                left.remove(row["case"])
            report.say(rows, row)
    except CutOff:
        for name in left:
            report.say(rows, {"case": name, "status": NOT_REACHED, "why": "the time of this part was over"})
    except JobFailed as error:
        for name in left or ["its end"]:
            report.say(rows, {"case": name, "status": "failed", "why": str(error)})


def _steps(setting: Setting, report: Report, rows: list[Row], deadline: Deadline) -> None:
    with Worker(setting.environment, setting.log) as engine, Worker(setting.environment, setting.log) as comfyui:
        for case in cases(setting.sizes):
            about = {"who": case.way, "case": str(case), **asdict(case)}
            missing = _missing(setting, case)
            if missing:
                report.say(rows, {**about, "status": "skipped", "why": missing})
                continue
            if deadline.left < LEAST_SECONDS:
                report.say(rows, {**about, "status": NOT_REACHED, "why": "the time was over"})
                continue
            native = case.way == COMFYUI
            (engine if native else comfyui).close()  # what it keeps on the card and in RAM is the other's
            job = {
                "do": "native" if native else "blocks",
                "folder": str(setting.scratch),
                "device": setting.device,
                "sizes": setting.sizes.to_json(),
                "comfyui": str(setting.comfyui),
                "case": asdict(case),
                "seconds": deadline.left,
            }
            report.say(rows, {**about, **_one(comfyui if native else engine, job, deadline)})


def _one(worker: Worker, job: Row, deadline: Deadline) -> Row:
    try:
        (row,) = worker.rows(job, deadline)
    except CutOff:
        return {"status": NOT_REACHED, "why": "the time was over in the middle of it"}
    except JobFailed as error:
        return {"status": "failed", "why": str(error)}
    return row


def _missing(setting: Setting, case: Case) -> str:
    """Which peer of the case is not here, by its name."""
    if case.way == COMFYUI and setting.comfyui is None:
        return "no ComfyUI: set COMFYUI_PATH to its source"
    wanted = ["diffusers", "accelerate", "psutil", "numpy", "packaging", "safetensors"]
    if case.way == COMFYUI and setting.cuda:
        wanted.append("comfy-aimdo")
    if case.stored in ("nf4", "fp4"):
        wanted.append("bitsandbytes")
    if case.stored.startswith("GGUF"):
        wanted.append("gguf")
    if case.stored in KITCHEN or case.how in (STORED, STORED_LORA, STORED_ATTENTION):
        wanted.append("comfy-kitchen")
    missing = [name for name in wanted if name in setting.absent]
    return f"needs {', '.join(missing)}" if missing else ""
