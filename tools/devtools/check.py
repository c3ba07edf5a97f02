"""`python dev.py test`: lint, format, types and tests, all, whichever fail; the engine's with other packages too."""

import os
import subprocess

from .cache import REPOSITORY, SetupError
from .overlay import OVERLAYS, Overlay, overlay_arguments, prepare_overlay, with_overlay
from .prepare import Prepared, child_environment

WORKERS = 2  # of pytest: each has its own ComfyUI servers, and takes up to 7 GB


def run_checks(prepared: Prepared, pytest_arguments: list[str]) -> int:
    """Run every check, pytest last; 0 if all passed. Prints which did not, before pytest's closing line."""
    tests = ["pytest", *(pytest_arguments or _parallel())]
    commands = (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"], tests)
    # where all tests run; a person who names some wants those
    failed = [] if pytest_arguments else [overlay.name for overlay in OVERLAYS if _run_over(overlay, prepared)]
    code = 0
    for command in commands:
        name = " ".join(command[:2]) if command[0] == "ruff" else command[0]
        if command[0] == "pytest" and failed:
            print(f"Not passed: {', '.join(failed)}")
        print(f"== {name}", flush=True)
        # the scripts, not python -m: that would put the repository on sys.path, where nodes/ shadows ComfyUI's nodes.py
        arguments = [prepared.python.with_name(command[0]), *command[1:]]
        code = subprocess.run(arguments, cwd=REPOSITORY, env=child_environment(prepared)).returncode
        if code:
            failed.append(name)
    return (code or 1) if failed else 0


def _parallel() -> list[str]:
    """A file's tests share what they make, so that they stay together."""
    return ["-q", "-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "loadfile"]


def _run_over(overlay: Overlay, prepared: Prepared) -> int:
    """The engine's tests with other packages; 0 if all passed."""
    print(f"== {overlay.name}: {' '.join(overlay.requirements)}", flush=True)
    try:
        folder = prepare_overlay(overlay, prepared.python)
    except SetupError as error:
        print(error, flush=True)
        return 1
    environment = with_overlay(child_environment(prepared), folder)
    command = [prepared.python.with_name("pytest"), *_parallel(), *overlay_arguments(overlay)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment).returncode
