"""`python dev.py test`: lint, format, types and tests, all of them, whichever fail."""

import subprocess

from .cache import REPOSITORY
from .prepare import Prepared, child_environment


def run_checks(prepared: Prepared, pytest_arguments: list[str]) -> int:
    """Run every check, pytest last; 0 if all passed. Prints which did not, before pytest's closing line."""
    commands = (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"], ["pytest", *pytest_arguments])
    failed = []
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
