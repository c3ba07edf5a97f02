"""One weight of the real size (the MLP's, 3072x12288) in every storage format: its size, its error, its speed.

    python dev.py bench formats

`bits` are bits per weight, scales included. `error` is the norm of what the format loses over the norm of the weights,
which are normally distributed. `encode_gb_s` and `decode_gb_s` are GB of bf16 weights per second, the median of turns;
encoding is empty where other programs make the files. `scratch_bytes` is what decoding takes beside its result.
`peer_gb_s` is how fast ComfyUI's own library decodes a piece of the same bytes: comfy-kitchen what ComfyUI quantizes,
the gguf package what ComfyUI-GGUF leaves to it.
K types of GGUF and the smaller IQ types cannot be made here: they decode random blocks, and have no error.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import gguf
import numpy as np
import torch
from comfy_kitchen import (
    dequantize_convrot_w4a4_weight,
    dequantize_mxfp8,
    dequantize_nvfp4,
    quantize_convrot_w4a4_weight,
)
from comfy_kitchen.tensor import TensorCoreMXFP8Layout, TensorCoreNVFP4Layout, TensorWiseINT8Layout
from gguf import GGMLQuantizationType
from nunchaku_files import svdq
from qwenimage_lowvram.engine.formats import CODECS, ENCODERS, decode_alone
from qwenimage_lowvram.engine.formats.bnb4 import NF4
from qwenimage_lowvram.engine.formats.gguf import GGUF, GgufCodec
from qwenimage_lowvram.engine.formats.gguf_grids import tables as grid_tables
from qwenimage_lowvram.engine.formats.int8_convrot import INT8_CONVROT
from qwenimage_lowvram.engine.formats.kitchen import KITCHEN
from qwenimage_lowvram.engine.formats.kitchen_w4a8 import W4A8, load_w4a8
from qwenimage_lowvram.engine.formats.scaled_fp8 import SCALED_FP8
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
ERROR_ROWS = 128
PEER_ROWS = 256
_W4A8 = W4A8["ASYM_W4A8_INT8_256"]

Parts = Sequence[Tensor]


@dataclass(frozen=True)
class _Format:
    """`few` makes the parts that the error is taken from, None where nothing here can."""

    who: str
    codec: str
    parts: Callable[[Tensor], Parts]
    few: Callable[[Tensor], Parts | None]
    encodes: bool
    peer: Callable[[Tensor, Parts], Any] | None = None


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
        yield _Format(codec.name, codec.name, encode, encode, False, partial(_comfyui_decodes, codec.name))
    with suppress(ImportError, AttributeError):  # a comfy-kitchen that is older than the format
        load_w4a8()
        encode = partial(_by_comfyui, _W4A8.name)
        yield _Format(_W4A8.name, _W4A8.name, encode, encode, False, partial(_comfyui_decodes, _W4A8.name))
    for codec in GGUF:
        blocks, quantized = partial(_random_blocks, codec), partial(_quantized, codec)
        yield _Format(codec.name, codec.name, blocks, quantized, False, partial(_by_gguf, codec))
    for kind in ("int4", "fp4"):
        for rank in (32, 128):
            layer = partial(_as_nunchaku, kind, rank)
            yield _Format(f"svdq_{kind}_r{rank}", f"svdq_{kind}_r{rank}", layer, layer, False)


def _row(format_: _Format, weight: Tensor, turns: int) -> dict[str, Any]:
    # singular vectors of a few rows would say more of them than those of a whole weight
    parts, few = format_.parts(weight), weight if format_.codec.startswith("svdq") else weight[:ERROR_ROWS]
    few_parts, out = format_.few(few), torch.empty_like(weight)
    codec = CODECS[format_.codec]
    encodes = format_.encodes and parts[0] is not weight
    return {
        "who": format_.who,
        "case": "x".join(map(str, weight.shape)),
        "bits": sum(part.nbytes for part in parts) * 8 / weight.numel(),
        "error": None if few_parts is None else _error(format_.codec, few, few_parts),
        "encode_gb_s": _speed(lambda: format_.parts(weight), weight, turns) if encodes else None,
        "decode_gb_s": _speed(lambda: decode_alone(codec, out, parts), weight, turns),
        "peer_gb_s": None
        if format_.peer is None
        else _peer_speed(format_.peer, format_.parts, weight[:PEER_ROWS], turns),
        "scratch_bytes": codec.scratch_bytes(weight.shape, on_host=DEVICE.type == "cpu"),
    }


def _rotated(group: int, weight: Tensor) -> Parts:
    """By comfy-kitchen."""
    data, params = TensorWiseINT8Layout.quantize(weight, per_channel=True, convrot=True, convrot_groupsize=group)
    return [data, params.scale]


def _by_comfyui(name: str, weight: Tensor) -> Parts:
    """nvfp4, mxfp8 or convrot_w4a4_<group>, by comfy-kitchen."""
    if name == _W4A8.name:
        from comfy_kitchen import quantize_w4a8_int8_weight

        data, by_group, by_row, _, codebook = quantize_w4a8_int8_weight(weight)
        return [data, by_group, by_row, codebook]
    if name.startswith("convrot"):
        return list(quantize_convrot_w4a4_weight(weight, int(name.rpartition("_")[2])))
    layout = TensorCoreNVFP4Layout if name == "nvfp4" else TensorCoreMXFP8Layout
    data, params = layout.quantize(weight)
    scales = [params.block_scale, params.scale] if name == "nvfp4" else [params.scale]
    return [data, *scales]


def _random_blocks(codec: GgufCodec, weight: Tensor) -> Parts:
    blocks = torch.randint(0, 256, codec.raw_shape(weight.shape), dtype=torch.uint8, device=DEVICE)
    tables = [(shape, torch.frombuffer(bytearray(data), dtype=torch.int8)) for shape, data in grid_tables(codec.type)]
    return [blocks, *(table.view(shape).to(DEVICE) for shape, table in tables)]


def _quantized(codec: GgufCodec, weight: Tensor) -> Parts | None:
    """By the gguf package, which has no encoder for K types."""
    try:
        raw = gguf.quants.quantize(weight.float().cpu().numpy(), GGMLQuantizationType[codec.type])
    except NotImplementedError:
        return None
    return [torch.from_numpy(raw).to(DEVICE)]


def _as_nunchaku(kind: str, rank: int, weight: Tensor) -> Parts:
    """By the tests' packer, from singular vectors and the nearest codes."""
    stored = svdq(weight.cpu(), rank, kind).packed()
    names = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up", "wcscales", "wtscale")
    return [stored[name].to(DEVICE) for name in names if name in stored]


def _comfyui_decodes(name: str, weight: Tensor, parts: Parts) -> Tensor:
    if name == "nvfp4":
        return dequantize_nvfp4(parts[0], parts[2], parts[1], DTYPE)
    if name == "mxfp8":
        return dequantize_mxfp8(parts[0], parts[1], DTYPE)
    if name == _W4A8.name:
        return load_w4a8()(*parts[:3], codebook=parts[3], output_dtype=DTYPE)
    return dequantize_convrot_w4a4_weight(*parts, convrot_groupsize=int(name.rpartition("_")[2]), output_dtype=DTYPE)


def _by_gguf(codec: GgufCodec, weight: Tensor, parts: Parts) -> Any:
    with np.errstate(all="ignore"):  # random blocks have scales that are no numbers
        return gguf.quants.dequantize(parts[0].cpu().numpy(), GGMLQuantizationType[codec.type])


def _peer_speed(
    peer: Callable[[Tensor, Parts], Any], make: Callable[[Tensor], Parts], weight: Tensor, turns: int
) -> float:
    parts = make(weight)
    return _speed(lambda: peer(weight, parts), weight, turns)


def _error(codec: str, weight: Tensor, parts: Parts) -> float:
    out = torch.empty(weight.shape, dtype=torch.float32, device=DEVICE)
    decode_alone(CODECS[codec], out, parts)
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
