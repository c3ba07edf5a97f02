"""Where downloads and virtual environments live: one folder per user and platform. Creates nothing on import."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

APP_NAME = "comfyui-qwenimage-lowvram"
REPOSITORY = Path(__file__).resolve().parents[2]


class SetupError(Exception):
    """The machine lacks something that a command needs; the message says what, and how to get it."""


def cache_folder(platform: str = sys.platform, environ: Mapping[str, str] = os.environ) -> Path:
    """The platform's own place for files that can be fetched again."""
    home = Path(environ.get("USERPROFILE" if platform == "win32" else "HOME") or Path.home())
    if platform == "win32":
        base = Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / APP_NAME
