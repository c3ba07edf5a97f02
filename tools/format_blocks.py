"""A transformer block as a file's header has it, in every storage format: what decoding is counted and compared with.

Only tensors' names, dtypes and shapes; where bytes are wanted, `filled` draws them.
"""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from qwenimage_lowvram.engine.files.checkpoint import TensorEntry
from qwenimage_lowvram.engine.formats.gguf import GGUF
from qwenimage_lowvram.engine.streaming import StoredBlock, store_block
from torch import Tensor

FILE = Path("block")
Shapes = Mapping[str, tuple[int, ...]]
Entries = dict[str, TensorEntry]
Store = Callable[[str, int, int], Entries]
_SIZES = {"F32": 4, "BF16": 2, "F16": 2}


def block_shapes(dim: int = 3072, head_dim: int = 128) -> Shapes:
    """The parameters of a Qwen-Image block without modulation; the default is the real size."""
    matrices = {f"attn.{name}": (dim, dim) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    matrices |= {f"attn.{name}": (dim, dim) for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
    for mlp in ("img_mlp", "txt_mlp"):
        matrices |= {f"{mlp}.net.0.proj": (4 * dim, dim), f"{mlp}.net.2": (dim, 4 * dim)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in matrices.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    return shapes | {f"attn.{norm}.weight": (head_dim,) for norm in norms}


def block_in(format_: str, shapes: Shapes, dtype: torch.dtype = torch.bfloat16) -> StoredBlock:
    """A block with its matrices in that format, a key of STORES, and vectors as such files have them."""
    entries: Entries = {}
    for name, shape in shapes.items():
        layer, _, part = name.rpartition(".")
        if len(shape) == 2:
            entries |= {f"{layer}.{beside}": entry for beside, entry in STORES[format_]("weight", *shape).items()}
        else:
            entries[name] = _vector(format_, part, name, shape)
    return store_block(shapes, entries, dtype, format_)


def filled(block: StoredBlock, seed: int = 0) -> Tensor:
    """Raw bytes of a block: random codes, small scales."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.zeros(block.raw.nbytes, dtype=torch.uint8)
    for item, entry in zip(block.raw.items, block.parts, strict=True):
        view = item.view(raw)
        if entry.data is not None:
            view.copy_(torch.frombuffer(bytearray(entry.data), dtype=item.dtype).view(item.shape))
        elif item.dtype.is_floating_point:
            view.copy_((torch.rand(item.shape, generator=generator) + 0.5) * 0.05)
        else:
            raw[item.offset : item.end] = torch.randint(0, 256, (item.nbytes,), generator=generator, dtype=torch.uint8)
    return raw


def _entry(dtype: str, *shape: int, nbytes: int | None = None) -> TensorEntry:
    return TensorEntry(FILE, 0, prod(shape) * _SIZES.get(dtype, 1) if nbytes is None else nbytes, dtype, shape)


def _vector(format_: str, part: str, name: str, shape: tuple[int, ...]) -> TensorEntry:
    if format_.startswith("gguf"):
        return _entry("F32", *shape)
    if format_.startswith("svdq") and part == "bias":
        shifted = "_SHIFTED" if "int4" in format_ and ".net.2." in name else ""
        return TensorEntry(FILE, 0, 2 * shape[0], f"SVDQ{shifted}_BIAS_BF16", shape)
    return _entry("BF16", *shape)


def _plain(dtype: str) -> Store:
    return lambda name, rows, columns: {name: _entry(dtype, rows, columns)}


def _with_scales(dtype: str, **beside: Callable[[int, int], TensorEntry]) -> Store:
    """One byte a weight, or a half where `dtype` says so."""
    bits = 4 if dtype.startswith(("NVFP4", "CONVROT_W4A4", "ASYM", "NF4", "FP4")) else 8

    def store(name: str, rows: int, columns: int) -> Entries:
        made = {name: _entry(dtype, rows, columns, nbytes=rows * columns * bits // 8)}
        return made | {part.replace("__", "."): make(rows, columns) for part, make in beside.items()}

    return store


def _blocked(block: int, dtype: str) -> Callable[[int, int], TensorEntry]:
    return lambda rows, columns: _entry(dtype, -(-rows // 128) * 128, -(-(columns // block) // 4) * 4)


def _four_bits(kind: str, *, double: bool = False) -> Store:
    parts: dict[str, Callable[[int, int], TensorEntry]] = {
        "weight__absmax": lambda rows, columns: _entry("U8" if double else "F32", rows * columns // 64)
    }
    if double:
        parts["weight__nested_absmax"] = lambda rows, columns: _entry("F32", -(-rows * columns // 64 // 256))
        parts["weight__nested_quant_map"] = lambda rows, columns: _entry("F32", 256)
        parts["weight__nested_offset"] = lambda rows, columns: _entry("F32")
    return _with_scales(kind, **parts)


def _gguf(kind: str) -> Store:
    codec = next(codec for codec in GGUF if codec.type == kind)
    return lambda name, rows, columns: {
        name: _entry(kind, rows, columns, nbytes=prod(codec.raw_shape((rows, columns))))
    }


def _svdq(kind: str, rank: int) -> Store:
    group, scales = (64, "BF16") if kind == "INT4" else (16, "F8_E4M3")

    def store(name: str, rows: int, columns: int) -> Entries:
        made = {
            name: _entry(f"SVDQ_{kind}_R{rank}", rows, columns, nbytes=rows * columns // 2),
            "wscales": _entry(scales, columns // group, rows),
            "smooth_factor": _entry("BF16", columns),
            "proj_down": _entry("BF16", columns, rank),
            "proj_up": _entry("BF16", rows, rank),
        }
        return made if kind == "INT4" else made | {"wcscales": _entry("BF16", rows), "wtscale": _entry("F32")}

    return store


def _by_row(rows: int, columns: int) -> TensorEntry:
    return _entry("F32", rows, 1)


def _whole(rows: int, columns: int) -> TensorEntry:
    return _entry("F32")


STORES: Mapping[str, Store] = {
    "bf16": _plain("BF16"),
    "fp8": _plain("F8_E4M3"),
    "fp8, scaled": _with_scales("F8_E4M3", weight_scale=_whole),
    "fp8, scaled by row": _with_scales("F8_E5M2", weight_scale=_by_row),
    "int8": _with_scales("INT8", weight_scale=_by_row),
    "int8 of bitsandbytes": _with_scales("I8", SCB=lambda rows, columns: _entry("F32", rows)),
    "nf4": _four_bits("NF4"),
    "nf4, doubly": _four_bits("NF4", double=True),
    "fp4": _four_bits("FP4"),
    "int8_convrot": _with_scales("INT8_CONVROT256", weight_scale=_by_row),
    "nvfp4": _with_scales("NVFP4", weight_scale=_blocked(16, "F8_E4M3"), weight_scale_2=_whole),
    "mxfp8": _with_scales("MXFP8", weight_scale=_blocked(32, "F8_E8M0")),
    "convrot_w4a4": _with_scales("CONVROT_W4A4_256", weight_scale=lambda rows, columns: _entry("F32", rows)),
    "asym_w4a8": _with_scales(
        "ASYM_W4A8_INT8_256",
        weight_s_rel=lambda rows, columns: _entry("F8_E4M3", rows, columns // 16),
        weight_s_channel=lambda rows, columns: _entry("F32", rows),
        weight_codebook=lambda rows, columns: _entry("F32", 16),
    ),
    **{f"gguf {codec.type}": _gguf(codec.type) for codec in GGUF},
    **{f"svdq {kind.lower()} r{rank}": _svdq(kind, rank) for kind in ("INT4", "FP4") for rank in (32, 128)},
}
