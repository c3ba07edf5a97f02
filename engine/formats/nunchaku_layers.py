"""Which of a file's tensors are nunchaku's 4-bit layers: each described as the plain layers that it stands for.

Queries, keys and values, which nunchaku multiplies together, become three layers: each is a run of the fused one's
bytes. Reads no weight (nunchaku, models/linear.py and models/transformers/transformer_qwenimage.py).
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from ..errors import DamagedFile, WrongModel
from ..files.checkpoint import TensorEntry
from .nunchaku_codecs import AWQ, AWQ_BIAS, AWQ_GROUP, AWQ_SPLITS, MAX_RANK, SVDQ_BIAS, SVDQ_GROUPS, SVDQ_SHIFTED_BIAS
from .nunchaku_packing import RANK_STEP, TILE_ROWS

_DATA = ".qweight"
_FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SHIFTED = re.compile(r"(.*\.)?(img|txt)_mlp\.net\.2")
_MODULATION = re.compile(r"(.*\.)?(img|txt)_mod\.1")
_SIXTEEN_BITS = ("BF16", "F16")
_ONE = {"BF16": b"\x80\x3f", "F16": b"\x00\x3c"}

Tensors = dict[str, TensorEntry]
# by part: shape, and dtypes of which it has one
_Expected = Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]


def with_nunchaku_layers(tensors: Mapping[str, TensorEntry]) -> Tensors:
    """The tensors with every 4-bit layer of nunchaku's under the names of plain layers: `<layer>.weight` under the
    dtype that its codec is found by (SVDQ_INT4_R<rank>, SVDQ_FP4_R<rank>, AWQ_INT4), in its logical shape, the parts of
    it beside it, and `<layer>.bias`.

    Raises DamagedFile where parts do not belong together, WrongModel for a layer that is packed in another way.
    """
    layers = [name.removesuffix(_DATA) for name in tensors if name.endswith(_DATA)]
    if not layers:
        return dict(tensors)
    owned: dict[str, Tensors] = {layer: {} for layer in layers}
    result: Tensors = {}
    for name, entry in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer in owned:
            owned[layer][part] = entry
        else:
            result[name] = entry
    for layer, parts in owned.items():
        if len(parts["qweight"].shape) != 2:
            raise _damaged(
                layer, parts, "formats", "qweight is {found}", code="nunchaku.no_matrix", found=_told(parts["qweight"])
            )
        result |= _awq(layer, parts) if "wzeros" in parts else _svdq(layer, parts)
    return result


def _svdq(layer: str, parts: Tensors) -> Tensors:
    data, scales = parts["qweight"], parts.get("wscales")
    kind = "fp4" if scales is not None and scales.dtype == "F8_E4M3" else "int4"
    rows, columns = data.shape[0], data.shape[-1] * 2
    rank = parts["proj_down"].shape[-1] if "proj_down" in parts and parts["proj_down"].shape else 0
    parts = _with_unit_scales(parts, rows) if kind == "fp4" else parts
    expected = {
        "qweight": ((rows, columns // 2), ("I8", "U8")),
        "wscales": ((columns // SVDQ_GROUPS[kind], rows), ("F8_E4M3",) if kind == "fp4" else _SIXTEEN_BITS),
        "smooth_factor": ((columns,), _SIXTEEN_BITS),
        "proj_down": ((columns, rank), _SIXTEEN_BITS),
        "proj_up": ((rows, rank), _SIXTEEN_BITS),
    }
    if kind == "fp4":
        expected["wcscales"] = ((rows,), _SIXTEEN_BITS)
    if "bias" in parts:
        expected["bias"] = ((rows,), _SIXTEEN_BITS)
    _require_parts(layer, parts, expected, "SVDQuant")
    names = _names(layer)
    if rows % (TILE_ROWS * len(names)) or columns % TILE_ROWS:
        raise _damaged(
            layer,
            parts,
            "SVDQuant",
            "{rows} rows of {columns} do not split into tiles of {tile_rows}",
            code="nunchaku.no_tiles",
            rows=rows,
            columns=columns,
            tile_rows=TILE_ROWS,
        )
    if rank % RANK_STEP or not 0 < rank <= MAX_RANK:
        raise WrongModel(
            "{file}: {layer!r} is stored in nunchaku's SVDQuant with a low-rank part of rank {rank}, which is not "
            "supported: supported ranks are {step} to {most} in steps of {step}. Use the file of rank 32 or 128.",
            code="nunchaku.unsupported_rank",
            file=data.file,
            layer=layer,
            rank=rank,
            step=RANK_STEP,
            most=MAX_RANK,
        )
    result: Tensors = {}
    for index, name in enumerate(names):
        own = {part: _rows(part, entry, index, len(names)) for part, entry in parts.items()}
        shape = (rows // len(names), columns)
        result[f"{name}.weight"] = replace(own.pop("qweight"), dtype=f"SVDQ_{kind.upper()}_R{rank}", shape=shape)
        if "bias" in own:
            shifted = kind == "int4" and _SHIFTED.fullmatch(layer) is not None
            codec, bias = SVDQ_SHIFTED_BIAS if shifted else SVDQ_BIAS, own.pop("bias")
            result[f"{name}.bias"] = replace(bias, dtype=f"{codec.name.upper()}_{bias.dtype}")
        result |= {f"{name}.{part}": entry for part, entry in own.items() if part in expected or part == "wtscale"}
    return result


def _awq(layer: str, parts: Tensors) -> Tensors:
    data, scales = parts["qweight"], parts.get("wscales")
    rows, columns = data.shape[0] * 4, data.shape[-1] * 2
    if not _MODULATION.fullmatch(layer):
        raise WrongModel(
            "{file}: {layer!r} is stored in 4-bit AWQ, which is read only in nunchaku's modulation layers (img_mod.1, "
            "txt_mod.1). Use a file in bf16, fp8, int8 or GGUF.",
            code="nunchaku.awq_elsewhere",
            file=data.file,
            layer=layer,
        )
    groups = scales.shape[0] if scales is not None and scales.shape else 0
    expected = {
        "qweight": ((rows // 4, columns // 2), ("I32",)),
        "wscales": ((groups, rows), _SIXTEEN_BITS),
        "wzeros": ((groups, rows), _SIXTEEN_BITS),
        "bias": ((rows,), _SIXTEEN_BITS),
    }
    _require_parts(layer, parts, expected, "AWQ")
    if columns % AWQ_GROUP or groups < columns // AWQ_GROUP or rows % (2 * AWQ_SPLITS):
        raise _damaged(
            layer,
            parts,
            "AWQ",
            "{rows} rows of {columns} and {groups} groups do not match",
            code="nunchaku.wrong_groups",
            rows=rows,
            columns=columns,
            groups=groups,
        )
    bias = parts["bias"]
    return {
        f"{layer}.weight": replace(data, dtype=AWQ.name.upper(), shape=(rows, columns)),
        f"{layer}.bias": replace(bias, dtype=f"{AWQ_BIAS.name.upper()}_{bias.dtype}"),
        f"{layer}.wscales": parts["wscales"],
        f"{layer}.wzeros": parts["wzeros"],
    }


def _names(layer: str) -> tuple[str, ...]:
    """The plain layers that one of nunchaku's stands for."""
    for fused, names in _FUSED.items():
        if layer == fused or layer.endswith(f".{fused}"):
            return tuple(layer.removesuffix(fused) + name for name in names)
    return (layer,)


def _rows(part: str, entry: TensorEntry, index: int, count: int) -> TensorEntry:
    """Of a part that has rows as the weight has them, those of one of `count` layers."""
    if count == 1 or part in ("smooth_factor", "smooth_factor_orig", "proj_down", "wtscale"):
        return entry
    nbytes = entry.nbytes // count
    axis = len(entry.shape) - 1 if part in ("wscales", "bias", "wcscales") else 0
    shape = tuple(n // count if i == axis else n for i, n in enumerate(entry.shape))
    if entry.data is not None:
        return replace(entry, nbytes=nbytes, shape=shape, data=entry.data[index * nbytes : (index + 1) * nbytes])
    return replace(entry, offset=entry.offset + index * nbytes, nbytes=nbytes, shape=shape)


def _with_unit_scales(parts: Tensors, rows: int) -> Tensors:
    """fp4's scales by row and of the whole tensor, where a file leaves them out because they are one."""
    file = parts["qweight"].file
    ones = TensorEntry(file, 0, 2 * rows, "BF16", (rows,), data=_ONE["BF16"] * rows)
    whole = TensorEntry(file, 0, 4, "F32", (), data=struct.pack("<f", 1))
    return {"wcscales": ones, "wtscale": whole, **parts}


def _require_parts(layer: str, parts: Tensors, expected: _Expected, what: str) -> None:
    for part, (shape, dtypes) in expected.items():
        entry = parts.get(part)
        if entry is None or entry.shape != shape or entry.dtype not in dtypes or 0 in shape:
            raise _damaged(
                layer,
                parts,
                what,
                "{part} is {found}, but {dtypes}{shape} is needed",
                code="nunchaku.wrong_part",
                part=part,
                found=_told(entry),
                dtypes="/".join(dtypes),
                shape=list(shape),
            )
    whole = parts.get("wtscale")
    if whole is not None and (prod(whole.shape) != 1 or whole.dtype not in ("F32", *_SIXTEEN_BITS)):
        raise _damaged(
            layer,
            parts,
            what,
            "wtscale is {found}, but one number is needed",
            code="nunchaku.wrong_scale",
            found=_told(whole),
        )


def _told(entry: TensorEntry | None) -> str:
    return "missing" if entry is None else f"{entry.dtype}{list(entry.shape)}"


def _damaged(layer: str, parts: Tensors, kind: str, why: str, *, code: str, **values: Any) -> DamagedFile:
    return DamagedFile(
        f"{{file}}: {{layer!r}} is not a complete layer of nunchaku's {{kind}}: {why}. Download it again.",
        code=code,
        file=parts["qweight"].file,
        layer=layer,
        kind=kind,
        **values,
    )
