"""Make one folder appear at a second place: a symbolic link, else a junction, else a copy."""

import shutil
import sys
from enum import Enum
from pathlib import Path

# never part of what a server loads
_NOT_COPIED = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "node_modules")


class LinkKind(Enum):
    SYMLINK = "symbolic link"
    JUNCTION = "junction"
    COPY = "copy"


def link_folder(source: Path, target: Path, *, may_copy: bool = True) -> LinkKind:
    """Show `source` at `target`, replacing an older link or copy there; its parent is made.

    Raises OSError where no link can be made and `may_copy` is False (large models).
    """
    remove_link(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source.resolve(), target_is_directory=True)
        return LinkKind.SYMLINK
    except OSError:  # Windows without the privilege, or a file system without links
        if _make_junction(source.resolve(), target):
            return LinkKind.JUNCTION
        if not may_copy:
            raise
    shutil.copytree(source, target, ignore=_NOT_COPIED)
    return LinkKind.COPY


def remove_link(target: Path) -> None:
    """Remove a link made by `link_folder`, never what it points to."""
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        try:
            target.rmdir()  # a junction goes, its contents stay; a copy is not empty
        except OSError:
            shutil.rmtree(target)


def _make_junction(source: Path, target: Path) -> bool:
    if sys.platform != "win32":
        return False
    import _winapi

    try:
        _winapi.CreateJunction(str(source), str(target))
    except OSError:
        return False
    return True
