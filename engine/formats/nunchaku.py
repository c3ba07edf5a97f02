"""nunchaku's 4-bit formats, SVDQuant and AWQ: how they are told, and how their bytes lie."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..files.checkpoint import TensorEntry
from .format import Format, Layout, StoredParam, Tensors
from .nunchaku_codecs import AWQ, NUNCHAKU, PARTS, SVDQ, SVDQ_SHIFTED_BIAS, SvdqCodec
from .nunchaku_layers import with_nunchaku_layers
from .nunchaku_packing import TILE_ROWS
from .plain import TORCH_DTYPES

_AWQ_DTYPE = AWQ.name.upper()


class Nunchaku(Format):
    """Layers of nunchaku's, told by the names of their parts."""

    dtypes = NUNCHAKU.keys()
    codecs = tuple(dict.fromkeys(NUNCHAKU.values()))

    def describe(self, tensors: Tensors, metadata: Mapping[str, str], path: Path) -> Tensors:
        return with_nunchaku_layers(tensors)

    def recognise(self, name: str, tensors: Tensors) -> StoredParam:
        data = tensors[name]
        codec = NUNCHAKU[data.dtype]
        layer, shifted = name.rpartition(".")[0], codec is SVDQ_SHIFTED_BIAS
        beside = ("proj_down", "proj_up") if shifted else PARTS.get(type(codec), ())
        found = (tensors.get(f"{layer}.{part}") for part in beside)
        return StoredParam(
            name,
            data.shape,
            codec,
            (data, *(part for part in found if part)),
            read_beside=f"{layer}.weight" if shifted else None,
            tile_rows=TILE_ROWS if isinstance(codec, SvdqCodec) else 1,
        )

    def raw_layout(self, part: TensorEntry) -> Layout:
        if part.dtype in SVDQ:
            return torch.int8, (part.shape[0], part.shape[1] // 2)
        if part.dtype == _AWQ_DTYPE:
            return torch.int32, (part.shape[0] // 4, part.shape[1] // 2)
        return TORCH_DTYPES[part.dtype.rpartition("_")[2]], part.shape  # a bias
