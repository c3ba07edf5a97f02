"""A model of bf16 in the formats that people have, from its header alone. Only its blocks' matrices change."""

from math import prod
from pathlib import Path

from qwenimage_lowvram.engine.caches.requantized_layout import FORMATS
from qwenimage_lowvram.engine.caches.requantized_weights import RequantizedWeights
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, TensorEntry
from qwenimage_lowvram.engine.formats.gguf import GgufCodec

BLOCKS = "transformer_blocks."


def in_format(source: Checkpoint, weight_format: str) -> Checkpoint:
    """bf16: as it is; fp8 and the loader's own names: as quantized at the first load; int8_convrot: ComfyUI's file;
    "GGUF Q4_K" and the like: every matrix of that kind."""
    if weight_format == "bf16":
        return source
    made = "fp8_e4m3fn_scaled" if weight_format == "fp8" else weight_format
    if made in FORMATS:
        weights = RequantizedWeights.of(source, made, Path("cache"))
        assert weights is not None
        return weights.checkpoint(data_start=0)
    tensors = {}
    for name, entry in source.tensors.items():
        tensors[name] = entry
        if name.startswith(BLOCKS) and len(entry.shape) == 2:
            if weight_format == "int8_convrot":
                tensors[name] = TensorEntry(entry.file, 0, prod(entry.shape), "INT8_CONVROT256", entry.shape)
                scale = TensorEntry(entry.file, 0, 4 * entry.shape[0], "F32", (entry.shape[0], 1))
                tensors[f"{name}_scale"] = scale
            else:
                kind = weight_format.removeprefix("GGUF ")
                nbytes = prod(GgufCodec(kind).raw_shape(entry.shape))
                tensors[name] = TensorEntry(entry.file, 0, nbytes, kind, entry.shape)
    return Checkpoint(source.path, tensors, {}, None, "transformer")
