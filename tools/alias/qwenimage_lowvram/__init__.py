"""Lets tests and tools import the pack as `qwenimage_lowvram` without putting the repository on sys.path.

The repository's own root must never be on sys.path: its `nodes/` would shadow ComfyUI's `nodes.py`.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[3])]
