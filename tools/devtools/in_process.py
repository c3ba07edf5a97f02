"""ComfyUI inside a test's own process: on the path, set to the CPU, its folders in a scratch directory."""

import atexit
import importlib
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

from .cache import REPOSITORY
from .comfyui import require_comfyui
from .server import prepare_base


@cache
def use_comfyui() -> Path:
    """ComfyUI's folder, from which modules can be imported from now on. Raises SetupError where there is none.

    Call it before anything of ComfyUI is imported: it reads its switches once.
    """
    comfyui = require_comfyui()
    base = Path(tempfile.mkdtemp(prefix="qwenimage-lowvram-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    prepare_base(base)
    # `python -m pytest` adds the repository, where nodes/ would shadow ComfyUI's nodes.py
    sys.path[:] = [str(comfyui), *(entry for entry in sys.path if Path(entry).resolve() != REPOSITORY)]
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = True
    args.base_directory = str(base)
    return comfyui
