"""Codes times their scales, with or without an offset: in fp32, each rounded, and once to the compute dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .chunks import chunk_rows
from .scratch import Scratch, padded


def scale_into(
    out: Tensor, codes: Tensor, scale: Tensor, scratch: Scratch, offset: Tensor | None = None, *, sign: int = 1
) -> None:
    """out = codes * scale + sign * offset.

    out: of the codes' shape, any floating dtype. scale, offset: fp32, broadcast. A GPU casts while it computes; on a
    CPU torch would make copies of everything for that, and so casts are operations of their own there.
    """
    if scratch.on_host:
        with scratch.lent():
            work = scaled(codes, scale, scratch)
            if offset is not None:
                work.add_(offset, alpha=sign)
            out.copy_(work)
    elif offset is not None:
        with scratch.lent():
            torch.add(scaled(codes, scale, scratch), offset, alpha=sign, out=out)
    elif codes.is_floating_point() and codes.dtype.itemsize == 1:
        out.copy_(codes).mul_(scale)  # fp8 is exact in any compute dtype, but torch multiplies it with no other
    else:
        torch.mul(codes, scale, out=out)


def scaled(codes: Tensor, scale: Tensor, scratch: Scratch, out: Tensor | None = None) -> Tensor:
    """codes * scale in fp32: in `out`, if that is given; in place where the codes are fp32; else in scratch."""
    work = out
    if work is None:
        work = codes if codes.dtype is torch.float32 else scratch.take(*codes.shape)
    if scratch.on_host:
        return (work if work is codes else work.copy_(codes)).mul_(scale)
    return torch.mul(codes, scale, out=work)


def scaling_bytes(weights: int, *, on_host: bool, offset: bool = False) -> int:
    """What `scale_into` takes for codes that are not fp32."""
    return 4 * weights if on_host or offset else 0


def scale_rows_into(out: Tensor, codes: Tensor, scale: Tensor, scratch: Scratch) -> None:
    """The same of a whole matrix (N, K), with a scale (1, 1) or (N, 1) of any floating dtype."""
    step = _rows(out.shape, on_host=scratch.on_host)
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        scale_into(out[rows], codes[rows], scale[rows] if len(scale) > 1 else scale, scratch)


def scaled_rows_bytes(shape: Sequence[int], *, on_host: bool) -> int:
    """What `scale_rows_into` takes of scratch."""
    return scaling_bytes(padded(_rows(shape, on_host=on_host) * shape[1]), on_host=on_host)


def _rows(shape: Sequence[int], *, on_host: bool) -> int:
    return chunk_rows(shape, 0, on_host=on_host)
