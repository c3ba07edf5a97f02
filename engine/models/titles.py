"""What a model's maker and its folder call it. Reads headers and small texts."""

import os
import re
from typing import Any

from ..files.checkpoint import Checkpoint
from ..files.json_texts import read_json
from ..files.model_files import USUAL_NAMES
from ..files.part_files import stem_of

# metadata in which a file's maker names it: GGUF's, and ModelSpec's of safetensors files
_TITLES = ("general.name", "general.basename", "modelspec.title")


def titles_of(checkpoint: Checkpoint) -> list[str]:
    """What metadata and the file's or the folder's name say."""
    path = checkpoint.path
    given = [checkpoint.metadata[key] for key in _TITLES if key in checkpoint.metadata]
    folder = path.parent.parent if not path.is_dir() and path.parent.name == "transformer" else path.parent
    stem = stem_of(path)
    # a folder, or a file with the name that every model has there: the folder above is named after it
    named_by_folder = path.is_dir() or re.sub(r"\W.*", "", stem) in USUAL_NAMES
    return [*given, folder.name if named_by_folder else stem]


def pipeline_index(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model_index.json of the pipeline that a transformer's folder belongs to; empty where there is none."""
    index = checkpoint.path.parent / "model_index.json"
    return read_json(index) if checkpoint.path.is_dir() and os.path.lexists(index) else {}
