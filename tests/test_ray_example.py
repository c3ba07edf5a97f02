"""100 prompts over two workers of a Ray cluster here, one of which is killed: nothing is lost or made twice."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from devtools.cache import REPOSITORY
from PIL import Image

COUNT, KILLED_AFTER = 100, 20
SMALL = ("--width", "64", "--height", "64", "--steps", "2", "--cfg", "1")


@pytest.fixture
def ray_environment() -> Iterator[dict[str, str]]:
    """Ray's own files in a folder of their own, whose name is short: sockets' names may not be long."""
    folder = tempfile.mkdtemp(prefix="ray")
    own = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    yield {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **own}
    shutil.rmtree(folder, ignore_errors=True)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("*.png")}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Ray's clusters are for Linux and macOS")
def test_a_worker_that_is_killed_loses_nothing_and_nothing_is_made_twice(
    small_pipeline: Path, ray_environment: dict[str, str], tmp_path: Path
) -> None:
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "images"
    prompts.write_text("".join(f"a cat with the number {number}\n" for number in range(COUNT)), encoding="utf-8")
    arguments = [prompts, small_pipeline, folder, "--workers", "2", "--cache", tmp_path / "cache", *SMALL]
    command = [sys.executable, REPOSITORY / "docs" / "examples" / "ray_prompts.py", *arguments]
    options = {"env": ray_environment, "cwd": tmp_path, "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as driver:
        told: list[str] = [driver.stdout.readline() for _ in range(KILLED_AFTER)]
        workers = [p for p in psutil.Process(driver.pid).children(recursive=True) if "ray::Painter" in p.name()]
        before = state(folder)
        assert len(workers) == 2, workers
        workers[0].send_signal(signal.SIGKILL)
        rest, errors = driver.communicate(timeout=600)
    assert driver.returncode == 0, errors
    told = [line.split()[1] for line in (*told, *rest.splitlines()) if line.rstrip().endswith(".png")]
    assert sorted(told) == [f"{number:05d}.png" for number in range(COUNT)]
    after = state(folder)
    assert sorted(after) == [f"{number:05d}.png" for number in range(COUNT)]
    assert {name: after[name] for name in before} == before
    for name in after:
        with Image.open(folder / name) as image:
            assert image.size == (64, 64)
            image.load()
    # a second call finds all of them there
    again = subprocess.run(command, capture_output=True, timeout=600, **options)
    assert again.returncode == 0, again.stderr
    assert state(folder) == after
    assert not any(worker.is_running() for worker in workers)
