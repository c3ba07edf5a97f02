"""What looking at files costs before anything is loaded: headers of real counts of tensors and tokens, the first time
and again, and the tokenizer.

    python dev.py bench headers

Each file is opened as the loader opens it (`first`: its header is read), then twice more (`again`: validation, the
check for a change and loading ask one after another). Headers only: the tensors are of 32 elements. The last files are
as slow as the bounds allow. Medians; the files are in the system's cache.
"""

import json
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from devtools.comfyui import require_comfyui
from gguf import GGUFWriter
from qwenimage_lowvram.engine.errors import CheckpointError
from qwenimage_lowvram.engine.files import checkpoint as checkpoints
from qwenimage_lowvram.engine.files.gguf_header import MAX_TEXTS
from qwenimage_lowvram.engine.files.header import HeaderCache
from qwenimage_lowvram.engine.files.safetensors_header import MAX_TENSORS
from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer
from small_checkpoint import TOKENIZER_IN_COMFYUI

TOKENS, MERGES = 152_064, 151_387  # Qwen2.5's
TRANSFORMER_TENSORS, ENCODER_TENSORS = 1_933, 338
LONG_AGO = 10**18  # ns: what was written just now is not kept


def rows(quick: bool) -> list[dict[str, Any]]:
    turns = 3 if quick else 9
    with tempfile.TemporaryDirectory() as folder:
        files = _files(Path(folder))
        made = [row for who, file in files.items() for row in _opened(who, file, turns)]
    tokenizer = require_comfyui() / TOKENIZER_IN_COMFYUI
    seconds = statistics.median(_seconds(lambda: PromptTokenizer(tokenizer)) for _ in range(turns))
    return [*made, {"who": "ComfyUI's tokenizer folder", "case": "first", "seconds": seconds}]


def _opened(who: str, file: Path, turns: int) -> list[dict[str, Any]]:
    first, again = [], []
    for _ in range(turns):
        checkpoints._HEADERS = HeaderCache()
        first.append(_seconds(lambda: _look(file)))
        again += [_seconds(lambda: _look(file)) for _ in range(2)]
    return [
        {"who": who, "case": case, "seconds": statistics.median(seconds)}
        for case, seconds in (("first", first), ("again", again))
    ]


def _look(file: Path) -> None:
    try:
        checkpoints.open_checkpoint(file)
    except CheckpointError:
        return  # the last files are no models


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _files(folder: Path) -> dict[str, Path]:
    made = {
        "GGUF transformer": _gguf(folder / "transformer.gguf", TRANSFORMER_TENSORS, 0, 0),
        "GGUF text encoder": _gguf(folder / "encoder.gguf", ENCODER_TENSORS, TOKENS, MERGES),
        "safetensors transformer": _safetensors(folder / "transformer.safetensors", TRANSFORMER_TENSORS),
        "GGUF, as many texts as may be": _gguf_of_texts(folder / "texts.gguf", MAX_TEXTS),
        "safetensors, as many tensors as may be": _safetensors(folder / "many.safetensors", MAX_TENSORS),
        "index of 200,000 files": _index(folder / "index", 200_000),
    }
    for file in made.values():
        os.utime(file, ns=(LONG_AGO, LONG_AGO))
    return made


def _gguf(file: Path, tensors: int, tokens: int, merges: int) -> Path:
    writer = GGUFWriter(file, "qwen2vl")
    if tokens:
        writer.add_token_list([f"token{i:06d}" for i in range(tokens)])
        writer.add_token_merges([f"to{i:06d} ken" for i in range(merges)])
        writer.add_array("tokenizer.ggml.token_type", [1] * tokens)
    for i in range(tensors):
        writer.add_tensor(f"transformer_blocks.{i}.attn.to_q.weight", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _gguf_of_texts(file: Path, count: int) -> Path:
    setting = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, count)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + setting + bytes(8 * count))
    return file


def _safetensors(file: Path, tensors: int) -> Path:
    header = {
        f"transformer_blocks.{i}.attn.to_q.weight": {
            "dtype": "F32",
            "shape": [32],
            "data_offsets": [128 * i, 128 * (i + 1)],
        }
        for i in range(tensors)
    }
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(128 * tensors))
    return file


def _index(folder: Path, files: int) -> Path:
    folder.mkdir()
    weight_map = {f"t{i}": f"{i}.safetensors" for i in range(files)}
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder
