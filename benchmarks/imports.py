"""What loading the pack costs a ComfyUI: seconds of importing it and listing its nodes' inputs, and what follows once.

    python dev.py bench imports

Each turn is a process of its own: ComfyUI's modules are imported first (`ComfyUI itself`), then the pack as ComfyUI's
loader does it, with INPUT_TYPES of every node (`the pack`), then diffusers' and transformers' classes as the first run
needs them (`the first run's packages`). Medians; the files are in the system's cache after the first turn.
"""

import json
import os
import statistics
import subprocess
import sys
from typing import Any

from devtools.cache import REPOSITORY

_CODE = """
import asyncio, json, sys, time
sys.argv = ["main.py", "--cpu"]
start = time.perf_counter()
import comfy.options; comfy.options.enable_args_parsing()
import nodes, comfy.sd, comfy.samplers, comfy_extras.nodes_qwen, server, execution, latent_preview
comfyui = time.perf_counter()
assert asyncio.run(nodes.load_custom_node(%r))
ours = [node for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("QwenLowVRAM")]
for node in ours:
    node.INPUT_TYPES()
pack = time.perf_counter()
import diffusers.models.transformers.transformer_qwenimage
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
later = time.perf_counter()
print(json.dumps([comfyui - start, pack - comfyui, later - pack]))
"""
_WHO = ("ComfyUI itself", "the pack", "the first run's packages")


def rows(quick: bool) -> list[dict[str, Any]]:
    turns = [_turn() for _ in range(2 if quick else 6)][1:]
    return [
        {"who": who, "case": f"median of {len(turns)}", "seconds": statistics.median(turn[i] for turn in turns)}
        for i, who in enumerate(_WHO)
    ]


def _turn() -> list[float]:
    comfyui = os.path.expanduser(os.environ["COMFYUI_PATH"])
    done = subprocess.run(
        [sys.executable, "-c", _CODE % str(REPOSITORY)],
        env={**os.environ, "PYTHONPATH": comfyui},
        cwd=comfyui,
        check=True,
        capture_output=True,
        text=True,
    )
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds
