"""Where quantized weights and encoded prompts are kept: chosen by a person, or in ComfyUI's models folder."""

import os
from pathlib import Path

import folder_paths

from ..engine.environment import variable

# of the environment; and a key of extra_model_paths.yaml, which is the folder's name as well
VARIABLE, NAME = "QWEN_LOWVRAM_CACHE", "qwen_lowvram"


def weight_cache_folder() -> Path:
    """Where the environment says, else where ComfyUI's extra_model_paths.yaml does, else beside the models."""
    given = variable(VARIABLE)
    if given:
        return Path(os.path.expanduser(given)).absolute()
    listed = folder_paths.folder_names_and_paths.get(NAME, ((), ()))[0]
    return Path(listed[0]) if listed else Path(folder_paths.models_dir) / NAME


def folder_until_the_end() -> Path:
    """In ComfyUI's temporary folder, which ComfyUI empties when it starts: for what cannot be kept."""
    return Path(folder_paths.get_temp_directory()) / NAME
