"""`python dev.py gpu`: on a machine with a CUDA device, what can only be known there. Installs nothing."""

import argparse
import datetime
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from on_gpu.cases import REAL, SMALL
from on_gpu.deadline import Deadline
from on_gpu.parts import Setting, run_all
from on_gpu.report import NOT_REACHED, Report, shown
from on_gpu.wheels import unpack
from on_gpu.worker import CutOff, JobFailed, Worker

from .bench import table
from .cache import REPOSITORY, SetupError
from .comfyui import comfyui_version, find_comfyui

SECONDS = 540
NO_CUDA = (
    "There is no CUDA device that this Python's torch {torch} can use. What to do: run it where there is one, with a "
    "torch that was built for CUDA; or try the command itself on the CPU, with small blocks: "
    "python dev.py gpu --cpu --small"
)
ON_CPU = "No CUDA device: run on the CPU as far as it goes. None of its seconds are a card's."


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="qwenimage-lowvram-gpu-") as folder:
        try:
            return _run(options, Path(folder))
        except (SetupError, OSError, zipfile.BadZipFile) as error:
            print(error, file=sys.stderr)
            return 1


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py gpu", description=__doc__)
    parser.add_argument("--here", action="store_true", help="use this Python as it is, which is what happens anyway")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="N", help=f"time for all of it ({SECONDS})")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE", help="the report (gpu.json)")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="packages that are not installed, as wheels")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="where files are written (5 GB for a while)")
    parser.add_argument("--cpu", action="store_true", help="without a CUDA device, as far as a CPU goes")
    parser.add_argument("--small", action="store_true", help="small blocks: to try the command, not to measure")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace, scratch: Path) -> int:
    deadline = Deadline(options.seconds)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    unpacked: list[str] = []
    if options.wheels is not None:
        if not options.wheels.is_dir():
            raise SetupError(f"--wheels is {options.wheels}, which is not a folder.")
        unpacked = unpack(options.wheels, scratch / "wheels")
        environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(scratch / "wheels")])
    comfyui = find_comfyui()
    setting = Setting(REPOSITORY, scratch, environment, comfyui, SMALL if options.small else REAL, "cpu", False, ())
    about = _about(setting, deadline)
    if about is None:
        return 1
    cuda = about["machine"]["gpu"] is not None
    if not cuda and not options.cpu:
        print(NO_CUDA.format(torch=about["versions"]["torch"]), file=sys.stderr)
        return 2
    use_cuda = cuda and not options.cpu
    about["versions"]["comfyui"] = comfyui_version(comfyui) if comfyui else None
    setting = Setting(
        REPOSITORY,
        scratch,
        environment,
        comfyui,
        setting.sizes,
        "cuda" if use_cuda else "cpu",
        use_cuda,
        about["absent"],
    )
    report = Report(
        options.json,
        command=" ".join(["python dev.py gpu", *sys.argv[2:]]),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        device=setting.device,
        small=options.small,
        wheels=unpacked,
        **about,
    )
    print(f"{about['machine']['gpu'] or about['machine']['cpu']}; torch {about['versions']['torch']}")
    if not use_cuda:
        print(ON_CPU)
    if about["absent"]:
        print(f"Not here, and done without: {', '.join(about['absent'])}.")
    run_all(setting, report, deadline.left)
    report.write(seconds=options.seconds - deadline.left, log=_log_of(setting))
    _print(report, options.json)
    return 0


def _about(setting: Setting, deadline: Deadline) -> dict[str, Any] | None:
    """The machine and the packages; None where not even those can be told, which is said."""
    with Worker(setting.environment, setting.log) as worker:
        try:
            (about,) = worker.rows({"do": "machine"}, deadline)
        except (JobFailed, CutOff) as error:
            print(f"{sys.executable} cannot be used: {error or 'it took too long'}. It needs torch.", file=sys.stderr)
            return None
    return about


def _log_of(setting: Setting) -> list[str]:
    """The end of what libraries printed, for who has to find out why something failed."""
    return setting.log.read_text(encoding="utf-8", errors="replace").splitlines()[-400:]


def _print(report: Report, file: Path) -> None:
    print(table(shown(report.rows)))
    not_reached = [row for row in report.rows if row["status"] == NOT_REACHED]
    if not_reached:
        print("Not reached: " + "; ".join(f"{row.get('who', row['part'])}: {row['case']}" for row in not_reached))
    print(f"Written to {file}")
