"""Installing the pack moves nothing that ComfyUI needs out of its range: requirements.txt is resolved into environments
of fabricated packages, from PyPI, by pip's fellow uv, without constraints."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from devtools.cache import REPOSITORY
from devtools.environment import venv_python
from uv import find_uv_bin

REQUIREMENTS = REPOSITORY / "requirements.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# what those releases need of each other, as their own metadata says; what is not named needs nothing here
OLDEST: Mapping[str, Sequence[str]] = {
    "torch==2.6.0": (),
    "torchvision==0.21.0": ("torch==2.6.0",),
    "torchaudio==2.6.0": ("torch==2.6.0",),
    "transformers==4.57.1": (
        "filelock", "huggingface-hub<1.0,>=0.34.0", "numpy>=1.17", "packaging>=20.0", "pyyaml>=5.1",
        "regex!=2019.12.17", "requests", "tokenizers<=0.23.0,>=0.22.0", "safetensors>=0.4.3", "tqdm>=4.27",
    ),
    "huggingface_hub==0.36.2": (
        "filelock", "fsspec>=2023.5.0", "packaging>=20.9", "pyyaml>=5.1", "requests", "tqdm>=4.42.1",
        "typing-extensions>=3.7.4.3", "hf-xet<2.0.0,>=1.1.3",
    ),
    "tokenizers==0.22.0": ("huggingface-hub<1.0,>=0.16.4",),
}  # fmt: skip
NEWEST: Mapping[str, Sequence[str]] = {
    "torch==2.14.1": (),
    "torchvision==0.29.1": ("torch==2.14.1",),
    "torchaudio==2.11.0": (),
    "transformers==5.24.0": (
        "huggingface-hub<3.0,>=1.31.0", "numpy>=1.17", "packaging>=20.0", "pyyaml>=5.1", "regex>=2025.10.22",
        "tokenizers<0.24.0,>=0.23.1", "typer", "safetensors>=0.8.0", "tqdm>=4.60",
    ),
    "huggingface_hub==2.4.0": (
        "filelock>=3.10.0", "fsspec>=2023.5.0", "packaging>=20.9", "pyyaml>=5.1", "tqdm>=4.42.1",
        "typing-extensions>=4.1.0",
    ),
    "tokenizers==0.23.3": ("huggingface-hub<3.0,>=0.16.4",),
}  # fmt: skip
# what both have beside those, in an old and a new release
COMMON = {
    "numpy": ("1.26.4", "2.2.6"),
    "safetensors": ("0.4.3", "0.8.0"),
    "filelock": ("3.16.0", "3.20.0"),
    "fsspec": ("2024.6.0", "2025.9.0"),
    "packaging": ("23.0", "25.0"),
    "pyyaml": ("6.0.1", "6.0.3"),
    "regex": ("2024.5.15", "2025.11.3"),
    "requests": ("2.32.0", "2.32.5"),
    "tqdm": ("4.66.0", "4.67.1"),
    "typing-extensions": ("4.12.0", "4.15.0"),
    "typer": ("0.15.0", "0.20.0"),
    "hf-xet": ("1.1.3", "1.6.0"),
    "pillow": ("10.4.0", "12.0.0"),
    "psutil": ("6.0.0", "7.1.0"),
    "sentencepiece": ("0.2.0", "0.2.1"),
    "einops": ("0.8.0", "0.8.1"),
    "scipy": ("1.14.1", "1.15.3"),
    "aiohttp": ("3.11.8", "3.13.0"),
}
ENVIRONMENTS = {"oldest": (OLDEST, 0), "newest": (NEWEST, 1)}
# of ComfyUI's own requirements, those that have a bound and could move
OF_COMFYUI = ("numpy>=1.25.0", "transformers>=4.50.3", "tokenizers>=0.13.3", "safetensors>=0.4.2", "aiohttp>=3.11.8")


def write_package(site: Path, name: str, version: str, needs: Sequence[str]) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    (folder / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (folder / "RECORD").touch()


def make_environment(folder: Path, packages: Mapping[str, Sequence[str]], column: int) -> Path:
    """A virtual environment of packages that are nothing but their metadata; its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.rglob("site-packages")
    for release, needs in packages.items():
        write_package(site, *release.split("=="), needs)
    for name, versions in COMMON.items():
        write_package(site, name, versions[column], ())
    write_package(site, "comfyui-requirements", "1", OF_COMFYUI)
    return site


def uv(*arguments: str | Path, folder: Path) -> str:
    """uv's words, on the environment in `folder`; nothing that a person or a machine has set for it counts."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    command = [find_uv_bin(), *arguments, "--no-config", "--python", venv_python(folder)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def install(site: Path, folder: Path, python: str, *wanted: str | Path) -> dict[str, str]:
    """Resolve, and do to the fabricated packages what uv would do; the versions that came."""
    options = ("--dry-run", "--python-version", python, "--only-binary", ":all:")
    said = uv("pip", "install", *options, *wanted, folder=folder)
    gone = dict(re.findall(r"^ - ([\w.-]+)==(\S+)", said, re.MULTILINE))
    came = dict(re.findall(r"^ \+ ([\w.-]+)==(\S+)", said, re.MULTILINE))
    for name, version in gone.items():
        (old,) = (path for path in site.glob("*.dist-info") if _is(path, name, version))
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    for name, version in came.items():
        write_package(site, name, version, ())
    return came


def _is(path: Path, name: str, version: str) -> bool:
    return path.name.lower().replace("_", "-") == f"{name}-{version}.dist-info"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "line by line"])
def test_installing_leaves_comfyuis_packages_in_their_ranges(
    whole: bool, environment: str, python: str, tmp_path: Path
) -> None:
    came = resolve(REQUIREMENTS.read_text(encoding="utf-8").splitlines(), whole, environment, python, tmp_path)
    assert "diffusers" in came
    assert not {"torch", "torchvision", "torchaudio", "transformers"} & came.keys(), json.dumps(came)


def resolve(lines: Sequence[str], whole: bool, environment: str, python: str, folder: Path) -> dict[str, str]:
    """Install the lines, and check that what is there fits together afterwards."""
    site = make_environment(folder / "env", *ENVIRONMENTS[environment])
    came: dict[str, str] = {}
    for wanted in [list(lines)] if whole else [[line] for line in lines]:
        came |= install(site, folder / "env", python, *wanted)
    uv("pip", "check", "--python-version", python, folder=folder / "env")
    return came


def test_a_diffusers_without_a_bound_would_break_the_oldest_environment(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)(huggingface-hub|transformers).*requires"):
        resolve(["diffusers>=0.37"], True, "oldest", "3.12", tmp_path)
