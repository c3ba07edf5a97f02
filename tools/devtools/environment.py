"""The virtual environment that everything runs in: ComfyUI's requirements, ours, and the test tools."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .cache import REPOSITORY, SetupError
from .comfyui import BUNDLED_VERSION

# torch and its companions, pinned together: the resolver tries many combinations otherwise
TORCH = ("torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0")
# ruff and mypy of one version everywhere: others find other things
TOOLS = (
    "ruff==0.17.6",
    "mypy==2.4.1",
    "pytest==9.1.1",  # under 9.2 pytest-xdist 3.8 no longer keeps groups of tests together
    "pytest-xdist==3.8.0",
    "comfy-import-guard==1.3.0",
    "hypothesis",
    "peft",
    "ray>=2.40; sys_platform != 'win32'",
    "uv",
)
# of ComfyUI's packages, those that the engine imports
FOR_ENGINE = ("transformers>=4.57.1,<6", "numpy", "Pillow", "psutil")
# PyPI's torch for Windows has no CUDA
_WINDOWS_CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
_STAMP = "installed-requirements.txt"

# run by the environment's own Python: which of the lines on stdin are not satisfied
_CHECK = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
from pip._vendor.packaging.requirements import Requirement
missing = []
for line in json.load(sys.stdin):
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate():
        continue
    try:
        satisfied = requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        satisfied = False
    if not satisfied:
        missing.append(line)
json.dump(missing, sys.stdout)
"""


def venv_folder(cache: Path, comfyui_version: str) -> Path:
    """One environment per ComfyUI version, because each pins its own frontend."""
    return cache / ("venv" if comfyui_version == BUNDLED_VERSION else f"venv-{comfyui_version}")


def venv_bin(venv: Path) -> Path:
    return venv / ("Scripts" if sys.platform == "win32" else "bin")


def venv_python(venv: Path) -> Path:
    return venv_bin(venv) / ("python.exe" if sys.platform == "win32" else "python")


def requirement_lines(comfyui: Path, pack: Path = REPOSITORY) -> list[str]:
    """Every requirement, torch pinned, without comments."""
    return [*TORCH, *TOOLS, *_lines(comfyui / "requirements.txt"), *_lines(pack / "requirements.txt")]


def requirement_name(line: str) -> str:
    """The package of a requirement line, as pip compares names."""
    return re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].lower().replace("_", "-")


def _lines(file: Path) -> list[str]:
    """Of a requirements file, without comments and without torch, which is pinned here."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and line not in ("torch", "torchvision", "torchaudio")]


def engine_requirement_lines(pack: Path = REPOSITORY) -> list[str]:
    """What the engine and its tests need where no ComfyUI is there to say which packages it brings."""
    return [*TORCH, *TOOLS, *FOR_ENGINE, *_lines(pack / "requirements.txt")]


def unsatisfied(venv: Path, requirements: Sequence[str]) -> list[str]:
    """The requirements that the environment lacks; all of them where there is no environment."""
    python, stamp = venv_python(venv), venv / _STAMP
    if not python.exists():
        return list(requirements)
    if stamp.exists() and stamp.read_text(encoding="utf-8").splitlines() == list(requirements):
        return []
    check = subprocess.run(
        [python, "-c", _CHECK], input=json.dumps(requirements), capture_output=True, text=True, encoding="utf-8"
    )
    if check.returncode:
        return list(requirements)
    missing: list[str] = json.loads(check.stdout)
    if not missing:
        _write_stamp(venv, requirements)
    return missing


def create_venv(venv: Path) -> None:
    """Raises SetupError where this Python cannot make one."""
    if venv_python(venv).exists():
        return
    result = subprocess.run([sys.executable, "-m", "venv", "--clear", venv], capture_output=True, text=True)
    if result.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        raise SetupError(
            f"{sys.executable} cannot make a virtual environment:\n{result.stdout}{result.stderr}\n"
            "On Debian and Ubuntu install the package python3-venv."
        )


def install(venv: Path, requirements: Sequence[str]) -> None:
    """Run pip over the requirements, all together. Raises SetupError where it fails."""
    command: list[str | Path] = [venv_python(venv), "-m", "pip", "install", *requirements]
    if sys.platform == "win32" and shutil.which("nvidia-smi"):
        command += ["--extra-index-url", _WINDOWS_CUDA_INDEX]
    if subprocess.run(command).returncode:
        raise SetupError(f"pip could not install the packages into {venv}. Its message stands above.")
    _write_stamp(venv, requirements)


def _write_stamp(venv: Path, requirements: Sequence[str]) -> None:
    (venv / _STAMP).write_text("\n".join(requirements) + "\n", encoding="utf-8")
