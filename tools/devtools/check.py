"""`python dev.py test`: lint, format, types and tests, all, whichever fail; the engine's with other packages too.

`--fast` is what a change is tried with: the same lint and types, and the engine's tests that need no ComfyUI and are
not slow.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .cache import REPOSITORY, SetupError
from .overlay import OVERLAYS, Overlay, overlay_arguments, prepare_overlay, with_overlay
from .prepare import Prepared, child_environment

WORKERS = 2  # of pytest: each takes up to 7 GB
STATIC = (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"])
WITHOUT_TORCH = "tests/without_torch"
QUICK = ["-m", "not slow and not comfyui"]


def run_checks(prepared: Prepared, pytest_arguments: Sequence[str], *, fast: bool = False) -> int:
    """Run every check, pytest last; 0 if all passed. Prints which did not, before pytest's closing line."""
    failed = []
    if not fast and not pytest_arguments:  # a person who names some tests wants those
        failed = [overlay.name for overlay in OVERLAYS if _run_over(overlay, prepared)]
    failed += run_lint(prepared)
    *first, last = _fast_tests(pytest_arguments) if fast else [["pytest", *(pytest_arguments or _parallel())]]
    failed += [" ".join(command) for command in first if _run(prepared, command)]
    if failed:
        print(f"Not passed: {', '.join(failed)}")
    return _run(prepared, last) or (1 if failed else 0)


def run_lint(prepared: Prepared) -> list[str]:
    """Lint, format and types; returns the commands that did not pass."""
    return [" ".join(command) for command in STATIC if _run(prepared, command)]


def _fast_tests(pytest_arguments: Sequence[str]) -> list[list[str]]:
    """pytest's command lines: what needs no torch by itself, where an import of it shows; or what the person names."""
    if pytest_arguments:
        return [["pytest", *QUICK, *pytest_arguments]]
    return [["pytest", "-q", WITHOUT_TORCH], ["pytest", *_parallel(), *QUICK, "tests/engine"]]


def _run(prepared: Prepared, command: Sequence[str]) -> int:
    print(f"== {' '.join(command)}", flush=True)
    # the scripts, not python -m: that would put the repository on sys.path, where nodes/ shadows ComfyUI's nodes.py
    program = prepared.python.with_name(command[0])
    return subprocess.run([program, *command[1:]], cwd=REPOSITORY, env=child_environment(prepared)).returncode


def _parallel() -> list[str]:
    """A server's tests stay together, and a file's: they share what they make (tests/conftest.py has the groups)."""
    return ["-q", "-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "loadgroup"]


def _run_over(overlay: Overlay, prepared: Prepared) -> int:
    """The engine's tests with other packages; 0 if all passed."""
    print(f"== {overlay.name}: {' '.join(overlay.requirements)}", flush=True)
    try:
        folder = prepare_overlay(overlay, prepared.python)
    except SetupError as error:
        print(error, flush=True)
        return 1
    environment = with_overlay(child_environment(prepared), folder)
    command: list[str | Path] = [prepared.python.with_name("pytest"), *_parallel(), *overlay_arguments(overlay)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment).returncode
