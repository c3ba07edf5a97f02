"""Everything a command needs, in the order it is needed: says what will be fetched, then fetches it."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from .browser import PageTools, find_page_tools, needs_browser_download, needs_node_download, prepare_page_tools
from .cache import SetupError, cache_folder
from .comfyui import BUNDLED_VERSION, comfyui_version, fetch_comfyui, find_comfyui
from .environment import (
    create_venv,
    engine_requirement_lines,
    install,
    requirement_lines,
    unsatisfied,
    venv_folder,
    venv_python,
)

_MB = 1_000_000


@dataclass(frozen=True)
class Prepared:
    """Where everything is."""

    comfyui: Path | None
    python: Path
    page: PageTools | None


@dataclass(frozen=True)
class Need:
    """One thing to be fetched, with its measured sizes on Linux with CUDA (the largest)."""

    what: str
    download_mb: int
    disk_mb: int


def prepare(*, page: bool) -> Prepared:
    """Set up what is missing. `page` adds a browser. Raises SetupError."""
    cache = cache_folder()
    comfyui = find_comfyui()
    venv = venv_folder(cache, comfyui_version(comfyui) if comfyui else BUNDLED_VERSION)
    lacking = unsatisfied(venv, requirement_lines(comfyui)) if comfyui else None
    announce(cache, needs(cache, comfyui, venv, lacking, page=page))
    create_venv(venv)
    if comfyui is None:
        comfyui = fetch_comfyui(venv_python(venv), cache)
    requirements = requirement_lines(comfyui)
    if unsatisfied(venv, requirements):
        install(venv, requirements)
    return Prepared(comfyui, venv_python(venv), prepare_page_tools(cache, venv) if page else None)


def prepare_engine() -> Prepared:
    """Set up what the engine's own tests need: Python packages, no ComfyUI and no browser. Raises SetupError."""
    cache = cache_folder()
    comfyui = find_comfyui()
    venv = venv_folder(cache, comfyui_version(comfyui) if comfyui else BUNDLED_VERSION)
    requirements = engine_requirement_lines()
    lacking = unsatisfied(venv, requirements)
    if lacking:
        announce(cache, [_packages(venv, lacking)])
        create_venv(venv)
        install(venv, requirements)
    return Prepared(comfyui, venv_python(venv), None)


def needs(cache: Path, comfyui: Path | None, venv: Path, lacking: list[str] | None, *, page: bool) -> list[Need]:
    """What is missing. `lacking` is None while ComfyUI's requirements are not known yet."""
    wanted = []
    if lacking or not venv_python(venv).exists():
        wanted.append(_packages(venv, lacking or []))
    if comfyui is None:
        wanted.append(Need(f"ComfyUI {BUNDLED_VERSION}", 12, 60))
    if page and find_page_tools(cache, venv) is None:
        if needs_node_download(venv):
            wanted.append(Need("Node.js", 65, 200))
        browser = needs_browser_download(cache, venv)
        wanted.append(
            Need("playwright-core" + (" and a browser" if browser else ""), *((120, 450) if browser else (4, 20)))
        )
    return wanted


def _packages(venv: Path, lacking: list[str]) -> Need:
    if venv_python(venv).exists() and not any(line.startswith("torch==") for line in lacking):
        return Need(f"Python packages: {', '.join(lacking)}", 300, 600)
    cuda = sys.platform == "linux"
    return Need("Python packages (torch, ComfyUI's and ours)", 3900 if cuda else 1300, 7700 if cuda else 3000)


def announce(cache: Path, wanted: list[Need]) -> None:
    """Say what will be fetched. Raises SetupError where the disk is too full for it."""
    if not wanted:
        return
    free_mb = shutil.disk_usage(_existing(cache)).free // _MB
    width = max(len(need.what) for need in wanted)
    print(f"To be fetched into {cache} ({free_mb / 1000:.1f} GB free), at most:")
    for need in wanted:
        print(f"  {need.what:<{width}}  download {need.download_mb / 1000:6.3f} GB  disk {need.disk_mb / 1000:6.3f} GB")
    sys.stdout.flush()
    total = sum(need.disk_mb for need in wanted)
    if total > free_mb:
        raise SetupError(f"That needs {total / 1000:.1f} GB of disk; {free_mb / 1000:.1f} GB are free at {cache}.")


def child_environment(prepared: Prepared) -> dict[str, str]:
    """For programs run in the environment: our tools and the pack importable, the repository's root not.

    Python keeps what it compiles, also where PYTHONDONTWRITEBYTECODE is set: a whole run of the tests starts ComfyUI
    dozens of times.
    """
    tools = Path(__file__).resolve().parents[1]
    ours = {
        "PYTHONPATH": os.pathsep.join([str(tools / "alias"), str(tools)]),
        "PYTHONIOENCODING": "utf-8",
    }
    if prepared.comfyui is not None:
        ours["COMFYUI_PATH"] = str(prepared.comfyui)
    # threads that spin while they wait take the cores from each other when several programs run
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {"OMP_WAIT_POLICY": "PASSIVE", **inherited, **ours}


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
