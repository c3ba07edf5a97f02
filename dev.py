"""Two commands for people and two for numbers: demo, test, bench, gpu. Python 3.10 or newer, nothing else installed.

python dev.py demo [--model PATH] [--ui]        the 4 GB workflow on a real ComfyUI, to the image
python dev.py test [pytest arguments]           lint, types and all tests, the real page included
python dev.py test --fast [pytest arguments]    lint, types and the engine's quick tests, without ComfyUI or a browser
python dev.py test --lint                       ruff and mypy alone, as before a commit
python dev.py bench NAME [--quick] [--json F]   a benchmark of benchmarks/
python dev.py gpu [--wheels FOLDER] [--json F]  nine minutes on a CUDA device, with this Python's own torch; --help
"""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - older Pythons get this far
        print(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}.", file=sys.stderr)
        return 2
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command not in ("demo", "test", "bench", "gpu"):
        print(__doc__)
        return 0 if command in ("-h", "--help") else 2
    sys.path.insert(0, str(REPOSITORY / "tools"))
    from devtools.cache import SetupError
    from devtools.prepare import Prepared, child_environment, prepare, prepare_engine

    if command == "gpu":  # with what is here: nothing is prepared
        return run_inside(
            Path(sys.executable), child_environment(Prepared(None, Path(sys.executable), None)), arguments
        )
    fast, lint = (command == "test" and option in rest for option in ("--fast", "--lint"))
    without_page = "not page" in rest  # as in: test -m "not page"
    try:
        prepared = prepare_engine() if fast or lint else prepare(page=command == "test" and not without_page)
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    if command == "test":
        from devtools.check import run_checks, run_lint

        if lint:
            return 1 if run_lint(prepared) else 0
        return run_checks(prepared, [argument for argument in rest if argument != "--fast"], fast=fast)
    return run_inside(prepared.python, child_environment(prepared), arguments)


def run_inside(python: Path, environment: dict[str, str], arguments: list[str]) -> int:
    """A command of tools/devtools by that Python."""
    inside: list[str | Path] = [python, REPOSITORY / "tools" / "run_in_venv.py", *arguments]
    process = subprocess.Popen(inside, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the child gets it too, and ends its server before itself
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
