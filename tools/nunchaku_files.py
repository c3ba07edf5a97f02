"""Quantize matrices as SVDQuant and AWQ do, and pack them as nunchaku's files have them, place by place.

Places are computed from row and column by nunchaku's public description of its layout (deepcompressor,
backend/nunchaku/utils.py), without the views that reading turns round. Codes are those of the nearest numbers: a file
of nunchaku's own is searched for better ones, and stored in the same way.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHIFT = 0.171875  # src/kernels/zgemm/gemm_w4a4_launch_impl.cuh: SHIFT_GELU
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_ALONE = ("attn.to_out.0", "attn.to_add_out", *(f"{s}_mlp.net.{n}" for s in ("img", "txt") for n in ("0.proj", "2")))
_MODULATION = ("img_mod.1", "txt_mod.1")

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class SvdqLayer:
    """A layer's numbers by row and column. codes: what the 4 bits stand for, (N, K); scales: (N, K / group), in fp4
    with the scales by row and of the whole in `by_row` (N,) and `whole`."""

    codes: Tensor
    scales: Tensor
    smooth: Tensor
    down: Tensor
    up: Tensor
    by_row: Tensor | None = None
    whole: float = 1.0

    def matrix(self) -> Tensor:
        """C in fp32: what the smoothed input is multiplied with."""
        rows, groups = self.scales.shape
        scales = self.scales.float() * self.whole
        scales = scales if self.by_row is None else scales * self.by_row.float()[:, None]
        return (self.codes.float().view(rows, groups, -1) * scales[:, :, None]).view(rows, -1)

    def weight(self) -> Tensor:
        """The one matrix that the layer is, in fp32."""
        return self.matrix() / self.smooth.float() + self.up.float() @ self.down.float()

    def output(self, x: Tensor, bias: Tensor, shift: float = 0.0) -> Tensor:
        """What the layer computes of x (n, K), in fp32, by the formula."""
        return (
            ((x + shift) / self.smooth.float()) @ self.matrix().T + (x @ self.down.float().T) @ self.up.float().T + bias
        )

    def packed(self) -> Weights:
        """The tensors of the file, without its bias."""
        parts = {
            "qweight": pack_codes(_bits(self.codes, fp4=self.by_row is not None)),
            "wscales": pack_scales(self.scales) if self.by_row is None else pack_micro_scales(self.scales),
            "smooth_factor": pack_scales(self.smooth[:, None]).view(-1),
            "smooth_factor_orig": pack_scales(self.smooth[:, None]).view(-1),
            "proj_down": pack_down(self.down),
            "proj_up": pack_up(self.up),
        }
        if self.by_row is not None:
            parts["wcscales"] = pack_scales(self.by_row[:, None]).view(-1)
            parts["wtscale"] = torch.tensor(self.whole)
        return parts


def svdq(
    weight: Tensor, rank: int, precision: str = "int4", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> SvdqLayer:
    """SVDQuant of a weight (N, K) in "int4" or "fp4": outliers in `rank` singular vectors, the rest in 4 bits."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(seed)
    smooth = (torch.rand(columns, generator=generator) + 0.5).to(dtype)
    smoothed = weight.float() * smooth.float()
    torch.manual_seed(seed)  # of the random projection within
    u, s, v = torch.svd_lowrank(smoothed, q=min(rank, *weight.shape), niter=1)
    missing = rank - len(s)
    up = torch.nn.functional.pad(u * s, (0, missing)).to(dtype)
    down = (torch.nn.functional.pad(v.T, (0, 0, 0, missing)) / smooth.float()).to(dtype)
    rest = smoothed - (up.float() @ down.float()) * smooth.float()
    if precision == "int4":
        groups = rest.view(rows, columns // 64, 64)
        scales = (groups.abs().amax(dim=2) / 7).clamp_min(1e-6).to(dtype)
        codes = (groups / scales.float()[:, :, None]).round().clamp(-8, 7).view(rows, columns)
        return SvdqLayer(codes, scales, smooth, down, up)
    whole = float(rest.abs().max() / (6 * 448))
    by_row = (torch.rand(rows, generator=generator) + 0.5).to(dtype)
    groups = (rest / (by_row.float()[:, None] * whole)).view(rows, columns // 16, 16)
    scales = (groups.abs().amax(dim=2) / 6).clamp(0.02, 448).to(torch.float8_e4m3fn)
    numbers = (groups / scales.float()[:, :, None]).view(rows, columns)
    levels = FP4.unique()
    codes = levels[torch.bucketize(numbers, (levels[1:] + levels[:-1]) / 2)]
    return SvdqLayer(codes, scales, smooth, down, up, by_row, whole)


def awq(weight: Tensor, bias: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Weights, Tensor, Tensor]:
    """A modulation layer (6 N, K) -> the tensors of the file, and the weight and the bias that they stand for."""
    rows, columns = weight.shape
    order = torch.arange(rows).view(6, rows // 6).T.reshape(-1)  # the file's rows: all six of a dimension together
    groups = weight.float()[order].view(rows, columns // 64, 64)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scales = ((high - low) / 15).clamp_min(1e-6).to(dtype)
    zeros = low.to(dtype)
    codes = ((groups - zeros.float()[:, :, None]) / scales.float()[:, :, None]).round().clamp(0, 15)
    meant = torch.empty(rows, columns)
    meant[order] = (codes * scales.float()[:, :, None] + zeros.float()[:, :, None]).view(rows, columns)
    one = torch.zeros(6, rows // 6)
    one[[1, 4]] = 1  # scales are stored as 1 + scale
    stored = (bias.float() + one.view(-1))[order].to(dtype)
    meant_bias = torch.empty(rows)
    meant_bias[order] = stored.float()
    parts = {
        "qweight": pack_awq(codes.view(rows, columns).to(torch.uint8)),
        "wscales": scales.T.contiguous(),
        "wzeros": zeros.T.contiguous(),
        "bias": stored,
    }
    return parts, meant, meant_bias - one.view(-1)


def write_nunchaku_transformer(
    file: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], *, rank: int = 32, precision: str = "int4"
) -> Weights:
    """A transformer as nunchaku's files have it, of bf16 numbers. -> the weights that it stands for, in fp32."""
    stored: Weights = {name: value for name, value in weights.items() if "transformer_blocks." not in name}
    meant: Weights = {name: value.bfloat16().float() for name, value in stored.items()}
    blocks = sorted({name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")}, key=int)
    for block in (f"transformer_blocks.{i}." for i in blocks):
        for name, value in weights.items():
            if name.startswith(block) and ".norm_" in name:
                stored[name], meant[name] = value, value.bfloat16().float()
        for fused, names in (*_FUSED.items(), *((name, (name,)) for name in _ALONE)):
            weight = torch.cat([weights[f"{block}{name}.weight"] for name in names])
            bias = torch.cat([weights[f"{block}{name}.bias"] for name in names]).float()
            layer = svdq(weight, rank, precision)
            shift = layer.matrix() / layer.smooth.float() @ torch.full((weight.shape[1],), SHIFT)
            shift = shift if precision == "int4" and fused.endswith("_mlp.net.2") else torch.zeros_like(bias)
            in_file = (bias - shift).bfloat16()
            stored |= {f"{block}{fused}.{part}": value for part, value in layer.packed().items()}
            stored[f"{block}{fused}.bias"] = pack_scales(in_file[:, None]).view(-1)
            for name, rows, of_bias in zip(
                names, layer.weight().chunk(len(names)), (in_file.float() + shift).chunk(len(names)), strict=True
            ):
                meant |= {f"{block}{name}.weight": rows, f"{block}{name}.bias": of_bias}
        for name in _MODULATION:
            parts, weight, bias = awq(weights[f"{block}{name}.weight"], weights[f"{block}{name}.bias"])
            stored |= {f"{block}{name}.{part}": value for part, value in parts.items()}
            meant |= {f"{block}{name}.weight": weight, f"{block}{name}.bias": bias}
    floating = {
        name: value.bfloat16() if value.dtype == torch.float32 and value.ndim else value
        for name, value in stored.items()
    }
    quantization = {
        "method": "svdquant",
        "rank": rank,
        "weight": {"dtype": "int4" if precision == "int4" else "fp4_e2m1_all"},
    }
    metadata = {
        "config": json.dumps(dict(config)),
        "model_class": "NunchakuQwenImageTransformer2DModel",
        "quantization_config": json.dumps(quantization),
    }
    save_file({name: value.contiguous().clone() for name, value in floating.items()}, file, metadata=metadata)
    return meant


# places: by tiles of 128 rows, so that the tables of places stay small


def pack_codes(bits: Tensor) -> Tensor:
    """(N, K) of 4 bits each -> int8 (N, K / 2)."""
    rows, columns = bits.shape
    n, k = torch.arange(128)[:, None], torch.arange(columns)
    word = (k // 64 * 8 + n // 16) * 8 + n % 8
    word = ((word * 4 + k % 32 // 8) * 2 + n % 16 // 8) * 2 + k % 64 // 32
    place = (word * 8 + k % 8).view(-1)
    packed = []
    for tile in bits.split(128):
        halves = torch.empty(128 * columns, dtype=torch.uint8)
        halves[place] = tile.reshape(-1)
        packed.append(halves[0::2] | halves[1::2] << 4)
    return torch.cat(packed).view(torch.int8).view(rows, columns // 2)


def pack_scales(scales: Tensor) -> Tensor:
    """(N, groups) -> (groups, N): four numbers of each of 32 lanes, rows 0 1 8 9, 2 3 10 11, ... 16 17 24 25, ..."""
    rows, groups = scales.shape
    n, g = torch.arange(rows)[:, None], torch.arange(groups)
    lane = n % 128 // 16 * 4 + n % 8 // 2
    place = ((n // 128 * groups + g) * 32 + lane) * 4 + n % 16 // 8 * 2 + n % 2
    return _placed(scales, place).view(groups, rows)


def pack_micro_scales(scales: Tensor) -> Tensor:
    """(N, groups) fp8 -> (groups, N): four rows of each of 32 lanes, 0 32 64 96, 8 40 72 104, ..., four groups each."""
    rows, groups = scales.shape
    n, g = torch.arange(rows)[:, None], torch.arange(groups)
    lane = n % 8 * 4 + n % 32 // 8
    place = (((n // 128 * (groups // 4) + g // 4) * 32 + lane) * 4 + n % 128 // 32) * 4 + g % 4
    return _placed(scales.view(torch.uint8), place).view(torch.float8_e4m3fn).view(groups, rows)


def pack_down(down: Tensor) -> Tensor:
    """(rank, K) -> (K, rank)."""
    rank, columns = down.shape
    r, c = torch.arange(rank)[:, None], torch.arange(columns)
    return _placed(down, _fragment(c // 16 * (rank // 16) + r // 16, r, c)).view(columns, rank)


def pack_up(up: Tensor) -> Tensor:
    """(N, rank) -> (N, rank)."""
    rows, rank = up.shape
    c, r = torch.arange(rows)[:, None], torch.arange(rank)
    return _placed(up, _fragment(c // 16 * (rank // 16) + r // 16, c, r)).view(rows, rank)


def _fragment(tile: Tensor, n: Tensor, k: Tensor) -> Tensor:
    """Places in fragments of 16x16 numbers of 16 bits: a lane holds two neighbours along k, of two times two."""
    lane = n % 8 * 4 + k % 8 // 2
    return ((tile * 32 + lane) * 2 + n % 16 // 8) * 4 + k % 16 // 8 * 2 + k % 2


def pack_awq(codes: Tensor) -> Tensor:
    """(N, K) of 4 bits -> int32 (N / 4, K / 2): rows by fours, 64 columns of each in turn; in 16 bits those 8 apart."""
    rows, columns = codes.shape
    n, k = torch.arange(4)[:, None], torch.arange(columns)
    sixteen = (k // 64 * 4 + n) * 16 + k % 64 // 32 * 8 + k % 8
    place = (sixteen * 4 + k % 32 // 8).view(-1)
    packed = torch.empty(rows // 4, 4 * columns, dtype=torch.uint8)
    packed[:, place] = codes.view(rows // 4, -1)
    return (packed[:, 0::2] | packed[:, 1::2] << 4).contiguous().view(torch.int32)


def _placed(values: Tensor, place: Tensor) -> Tensor:
    packed = torch.empty(values.numel(), dtype=values.dtype)
    packed[place.reshape(-1)] = values.reshape(-1)
    return packed


def _bits(codes: Tensor, *, fp4: bool) -> Tensor:
    """The four bits of each code: two's complement, or e2m1's sign and magnitude."""
    if not fp4:
        return (codes.to(torch.int16) & 15).to(torch.uint8)
    magnitude = torch.searchsorted(FP4[:8].contiguous(), codes.abs().contiguous())
    return (magnitude + 8 * torch.signbit(codes)).to(torch.uint8)
