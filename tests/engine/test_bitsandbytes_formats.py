"""Weights in int8, nf4 and fp4 decode as bitsandbytes decodes them, within their errors and their scratch memory."""

from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.formats import CODECS, ENCODERS, decode_alone
from qwenimage_lowvram.engine.formats.bnb4 import FP4, NF4, Bnb4Codec
from qwenimage_lowvram.engine.formats.chunks import CHUNK_WEIGHTS
from qwenimage_lowvram.engine.formats.int8 import BNB_INT8, INT8

functional: Any = pytest.importorskip("bitsandbytes.functional")
COMPUTE = [torch.float32, torch.bfloat16, torch.float16]
four_bit = pytest.mark.parametrize("codec", [NF4, FP4], ids=lambda codec: codec.name)
doubly = pytest.mark.parametrize("double", [False, True], ids=["single", "double"])


def a_weight(rows: int = 96, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.1


def decoded(codec: Any, parts: tuple[torch.Tensor, ...], like: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(like, float("nan"))
    decode_alone(CODECS[codec.name], out, parts)
    return out


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.float() - reference.float()).norm() / reference.float().norm())


@pytest.mark.slow
@four_bit
@doubly
@pytest.mark.parametrize("dtype", COMPUTE, ids=str)
@pytest.mark.parametrize("shape", [(96, 128), (7, 192), (1100, 2048)], ids=str)
def test_four_bit_weights_decode_bit_for_bit_as_bitsandbytes_does(
    codec: Bnb4Codec, double: bool, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = a_weight(*shape).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=codec.name, compress_statistics=double)
    parts = codec.encode(weight, double=double)
    assert torch.equal(parts[0], packed.view(-1))
    assert torch.equal(decoded(codec, parts, weight), functional.dequantize_4bit(packed, state))
    assert weight.numel() < CHUNK_WEIGHTS or weight.numel() % CHUNK_WEIGHTS


@pytest.mark.parametrize(
    ("name", "least", "most"), [("int8", 0.006, 0.009), ("nf4", 0.09, 0.094), ("fp4", 0.12, 0.124)]
)
def test_each_format_has_its_error(name: str, least: float, most: float) -> None:
    weight = a_weight(256, 512)
    assert least < relative(decoded(ENCODERS[name], ENCODERS[name].encode(weight), weight), weight) < most


@four_bit
def test_rows_need_not_be_whole_blocks(codec: Bnb4Codec) -> None:
    weight = a_weight(7, 96)  # bitsandbytes' own function for CPUs begins a block with each row, and loses half of it
    assert relative(decoded(codec, codec.encode(weight), weight), weight) < 0.14


@pytest.mark.parametrize("dtype", COMPUTE, ids=str)
def test_an_int8_weight_is_the_product_rounded_once(dtype: torch.dtype) -> None:
    weight = a_weight() * torch.logspace(-2, 2, 96)[:, None]
    data, scale = INT8.encode(weight)
    assert torch.equal(decoded(INT8, (data, scale), weight.to(dtype)), (data.float() * scale).to(dtype))
    assert ((data.float() * scale - weight).abs() <= scale * 0.5001).all()


def test_a_row_of_zeros_stays_zero() -> None:
    for name in ("int8", "nf4", "fp4"):
        weight = torch.zeros(4, 64)
        assert not decoded(ENCODERS[name], ENCODERS[name].encode(weight), weight).any()


def test_bitsandbytes_int8_weights_decode_as_its_own_function_does() -> None:
    data, maxima, _ = functional.int8_vectorwise_quant(a_weight().half())
    expected = functional.int8_vectorwise_dequant(data, maxima)
    assert relative(decoded(BNB_INT8, (data, maxima), expected), expected) < 1e-7
