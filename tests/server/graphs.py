"""The bundled workflows as prompts, and small changes to prompts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devtools.workflow import set_widgets, to_prompt

_ALL = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))
LIGHTNING = [path for path in _ALL if "Lightning" in path.stem]  # with a LoRA
EDITING = [path for path in _ALL if "Edit" in path.stem]
LAYERED = [path for path in _ALL if "layers" in path.stem]
WORKFLOWS = [path for path in _ALL if path not in (*LIGHTNING, *EDITING, *LAYERED)]
FOLDER = "from the folder"

Prompt = dict[str, Any]


def workflow(
    path: Path,
    object_info: Mapping[str, Any],
    loader: Mapping[str, Any],
    *,
    prompts: Mapping[str, str],
    size: Mapping[str, int],
    sample: Mapping[str, Any],
) -> Prompt:
    """A bundled graph with other values: loader 1, prompts 2, empty latent 3, sampler 4, decode 5, save 6."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    graph = set_widgets(graph, object_info, "QwenLowVRAMLoader", **{"weight_format": "as stored", **loader})
    graph = set_widgets(graph, object_info, "QwenLowVRAMEncodePrompts", **prompts)
    graph = set_widgets(graph, object_info, "EmptySD3LatentImage", **size)
    graph = set_widgets(graph, object_info, "QwenLowVRAMSample", **sample)
    return to_prompt(graph, object_info)


def changed(prompt: Mapping[str, Any], *removed: str, **nodes: tuple[str, dict[str, Any]]) -> Prompt:
    """The prompt without some nodes and with others put in: n4=("KSampler", {...})."""
    kept = {node: value for node, value in prompt.items() if node not in removed}
    return kept | {name[1:]: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def with_inputs(prompt: Mapping[str, Any], node: str, **inputs: Any) -> Prompt:
    """The prompt with some inputs of one node changed."""
    return {**prompt, node: {**prompt[node], "inputs": {**prompt[node]["inputs"], **inputs}}}
