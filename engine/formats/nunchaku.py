"""nunchaku's 4-bit formats, SVDQuant and AWQ: how they are told, and how their bytes lie."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..files.checkpoint import TensorEntry
from .format import Format, HeldPart, Layout, StoredParam, Tensors
from .nunchaku_codecs import AWQ, NUNCHAKU, PARTS, SVDQ, SVDQ_BIAS, SVDQ_SHIFTED_BIAS, SvdqCodec, SvdqOrderCodec
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
        found = {part: entry for part in beside if (entry := tensors.get(f"{layer}.{part}"))}
        bias = tensors.get(f"{layer}.bias")
        return StoredParam(
            name,
            data.shape,
            codec,
            (data, *found.values()),
            read_beside=f"{layer}.weight" if shifted else None,
            tile_rows=TILE_ROWS if isinstance(codec, SvdqCodec) else 1,
            held=self._held(data, codec, found) if isinstance(codec, SvdqCodec) else (),
            shifted_operands=bias is not None and NUNCHAKU.get(bias.dtype) is SVDQ_SHIFTED_BIAS,
            beside_stored=SVDQ_BIAS if shifted else None,
        )

    def _held(self, data: TensorEntry, codec: SvdqCodec, beside: Tensors) -> tuple[HeldPart, ...]:
        """As comfy-kitchen's products want them, what has something for each row first; in int4 alone."""
        if codec.kind != "int4":
            return ()
        rows, columns = data.shape
        shapes = {
            "codes": (data, (rows, columns // 2)),
            "scales": (beside["wscales"], (rows, columns // codec.group)),
            "up": (beside["proj_up"], (rows, codec.rank)),
            "down": (beside["proj_down"], (columns, codec.rank)),
            "smooth": (beside["smooth_factor"], (columns,)),
        }
        return tuple(
            HeldPart(part, SvdqOrderCodec(codec.name, name), (self._dtype(part), shape))
            for name, (part, shape) in shapes.items()
        )

    @staticmethod
    def _dtype(part: TensorEntry) -> torch.dtype:
        return torch.int8 if part.dtype in SVDQ else TORCH_DTYPES[part.dtype]

    def raw_layout(self, part: TensorEntry) -> Layout:
        if part.dtype in SVDQ:
            return torch.int8, (part.shape[0], part.shape[1] // 2)
        if part.dtype == _AWQ_DTYPE:
            return torch.int32, (part.shape[0] // 4, part.shape[1] // 2)
        return TORCH_DTYPES[part.dtype.rpartition("_")[2]], part.shape  # a bias
