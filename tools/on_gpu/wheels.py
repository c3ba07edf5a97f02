"""Packages that lie in a folder as wheels, unpacked for this run: nothing is installed, nothing is fetched."""

import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def unpack(folder: Path, into: Path) -> list[str]:
    """Unpack the wheels of `folder` whose packages are not installed; returns their files' names. `into` is then a
    folder for sys.path. Raises OSError and zipfile.BadZipFile."""
    wheels = [wheel for wheel in sorted(folder.glob("*.whl")) if not _is_installed(wheel.name.partition("-")[0])]
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    return [wheel.name for wheel in wheels]


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
