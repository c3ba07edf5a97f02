"""One weight of the real size (the MLP's, 3072x12288) in every storage format: its size, its error, its speed.

    python dev.py bench formats

`bits` are bits per weight, scales included. `error` is the norm of what the format loses over the norm of the weights,
which are normally distributed. `encode_gb_s` and `decode_gb_s` are GB of bf16 weights per second, the median of turns;
encoding is empty where other programs make the files. `scratch_bytes` is what decoding allocates beside its result.
K types of GGUF cannot be made here: they decode random blocks, and have no error.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gguf
import torch
from comfy_kitchen import quantize_convrot_w4a4_weight
from comfy_kitchen.tensor import TensorCoreMXFP8Layout, TensorCoreNVFP4Layout, TensorWiseINT8Layout
from gguf import GGMLQuantizationType
from qwenimage_lowvram.engine.formats import CODECS, ENCODERS
from qwenimage_lowvram.engine.formats.bnb4 import NF4
from qwenimage_lowvram.engine.formats.gguf import GGUF, GgufCodec
from qwenimage_lowvram.engine.formats.int8_convrot import INT8_CONVROT
from qwenimage_lowvram.engine.formats.kitchen import KITCHEN
from qwenimage_lowvram.engine.formats.scaled_fp8 import SCALED_FP8
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
ERROR_ROWS = 64

Parts = Sequence[Tensor]


@dataclass(frozen=True)
class _Format:
    """`few` makes the parts that the error is taken from, None where nothing here can."""

    who: str
    codec: str
    parts: Callable[[Tensor], Parts]
    few: Callable[[Tensor], Parts | None]
    encodes: bool


def rows(quick: bool) -> list[dict[str, Any]]:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns where there is no GPU
    shape, turns = ((768, 3072), 3) if quick else ((3072, 12288), 5)
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(DEVICE, DTYPE)
    with torch.inference_mode():
        return [_row(format_, weight, turns) for format_ in _formats()]


def _formats() -> Iterator[_Format]:
    for name, encoder in ENCODERS.items():
        yield _Format(name, name, encoder.encode, encoder.encode, True)
    by_row, doubly = partial(SCALED_FP8[0].encode, per_row=True), partial(NF4.encode, double=True)
    yield _Format(f"{SCALED_FP8[0].name}, by row", SCALED_FP8[0].name, by_row, by_row, True)
    yield _Format("nf4, doubly", NF4.name, doubly, doubly, True)
    for group, rotated in INT8_CONVROT.items():
        encode = partial(_rotated, group)
        yield _Format(rotated.name, rotated.name, encode, encode, False)
    for codec in KITCHEN.values():
        encode = partial(_by_comfyui, codec.name)
        yield _Format(codec.name, codec.name, encode, encode, False)
    for codec in GGUF:
        yield _Format(codec.name, codec.name, partial(_random_blocks, codec), partial(_quantized, codec), False)


def _row(format_: _Format, weight: Tensor, turns: int) -> dict[str, Any]:
    parts, few = format_.parts(weight), weight[:ERROR_ROWS]
    few_parts, out = format_.few(few), torch.empty_like(weight)
    codec = CODECS[format_.codec]
    encodes = format_.encodes and parts[0] is not weight
    return {
        "who": format_.who,
        "case": "x".join(map(str, weight.shape)),
        "bits": sum(part.nbytes for part in parts) * 8 / weight.numel(),
        "error": None if few_parts is None else _error(format_.codec, few, few_parts),
        "encode_gb_s": _speed(lambda: format_.parts(weight), weight, turns) if encodes else None,
        "decode_gb_s": _speed(lambda: codec.decode_into(out, parts), weight, turns),
        "scratch_bytes": codec.scratch_bytes(weight.shape),
    }


def _rotated(group: int, weight: Tensor) -> Parts:
    """By comfy-kitchen."""
    data, params = TensorWiseINT8Layout.quantize(weight, per_channel=True, convrot=True, convrot_groupsize=group)
    return [data, params.scale]


def _by_comfyui(name: str, weight: Tensor) -> Parts:
    """nvfp4, mxfp8 or convrot_w4a4_<group>, by comfy-kitchen."""
    if name.startswith("convrot"):
        return list(quantize_convrot_w4a4_weight(weight, int(name.rpartition("_")[2])))
    layout = TensorCoreNVFP4Layout if name == "nvfp4" else TensorCoreMXFP8Layout
    data, params = layout.quantize(weight)
    scales = [params.block_scale, params.scale] if name == "nvfp4" else [params.scale]
    return [data, *scales]


def _random_blocks(codec: GgufCodec, weight: Tensor) -> Parts:
    return [torch.randint(0, 256, codec.raw_shape(weight.shape), dtype=torch.uint8, device=DEVICE)]


def _quantized(codec: GgufCodec, weight: Tensor) -> Parts | None:
    """By the gguf package, which has no encoder for K types."""
    try:
        raw = gguf.quants.quantize(weight.float().cpu().numpy(), GGMLQuantizationType[codec.type])
    except NotImplementedError:
        return None
    return [torch.from_numpy(raw).to(DEVICE)]


def _error(codec: str, weight: Tensor, parts: Parts) -> float:
    out = torch.empty(weight.shape, dtype=torch.float32, device=DEVICE)
    CODECS[codec].decode_into(out, parts)
    return float((out - weight.float()).norm() / weight.float().norm())


def _speed(work: Callable[[], Any], weight: Tensor, turns: int) -> float:
    work()
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return weight.nbytes / 1e9 / statistics.median(seconds)
