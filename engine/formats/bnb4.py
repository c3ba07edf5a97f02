"""nf4 and fp4 as bitsandbytes stores them, through its operators on plain tensors. Never through its modules.

Their true shapes, and an offset, stand in notes beside them, the quant states.
"""

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DamagedFile, WrongModel
from ..files.checkpoint import TensorEntry
from ..packages import bitsandbytes
from .chunks import CHUNK_WEIGHTS
from .file_parts import ALIGNMENT, Part
from .format import Format, Layout, StoredParam, Tensors
from .notes import read_notes
from .scratch import Scratch, padded

BLOCK = 64  # weights that share a scale (absmax)
NESTED_BLOCK = 256  # scales that share a scale, where scales are quantized too
# JSON as bytes, written by bitsandbytes/functional.py (QuantState.as_dict)
_NOTE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
MAX_OFFSET = 1e30  # the mean of scales; a larger number is no fp32
# what the parts behind the data are called beside `<layer>.weight.`, in their order
_SCALES = ("absmax", "nested_absmax", "nested_quant_map", "nested_offset")


@dataclass(frozen=True)
class Bnb4Codec:
    """Two parts: 4-bit codes, two to a byte, and an fp32 absmax per 64 weights. Doubly quantized five: codes, uint8
    absmax, fp32 absmax per 256 of those, their code of 256 numbers, and an offset.

    Bit-equal to bitsandbytes' own dequantization to the compute dtype: by its operators that write in place. On a CPU
    it has none, and allocates what it decodes: there in chunks.
    """

    name: str

    def encode(self, weight: Tensor, *, double: bool = False) -> tuple[Tensor, ...]:
        flat = weight.contiguous().view(-1)
        packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
        absmax = torch.empty(-(-flat.numel() // BLOCK), dtype=torch.float32, device=flat.device)
        for start in range(0, flat.numel(), CHUNK_WEIGHTS):
            chunk = flat[start : start + CHUNK_WEIGHTS]
            codes, largest = load_operators().quantize_4bit(chunk, BLOCK, self.name, torch.uint8)
            packed[start // 2 :][: codes.numel()] = codes.view(-1)
            absmax[start // BLOCK :][: largest.numel()] = largest
        if not double:
            return packed, absmax
        code = _dynamic_code().to(weight.device)
        offset = absmax.mean()
        scales, nested = load_operators().quantize_blockwise(absmax - offset, code, NESTED_BLOCK)
        return packed, scales, nested, code, offset

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        packed, absmax, *nested = parts
        if scratch.on_host:
            self._decode_on_host(out.view(-1), packed, absmax, nested)
            return
        operators = load_operators()
        with scratch.lent():
            if nested:
                of_scales, code, offset = nested
                scales = scratch.take(*absmax.shape)
                operators.dequantize_blockwise.out(absmax, of_scales, code, NESTED_BLOCK, torch.float32, out=scales)
                absmax = scales.add_(offset)
            operators.dequantize_4bit.out(packed, absmax, BLOCK, self.name, out.shape, out.dtype, out=out)

    def _decode_on_host(self, out: Tensor, packed: Tensor, absmax: Tensor, nested: Sequence[Tensor]) -> None:
        for start in range(0, len(out), CHUNK_WEIGHTS):
            chunk = out[start : start + CHUNK_WEIGHTS]
            count, first = chunk.numel(), start // BLOCK
            scales = absmax[first : first + -(-count // BLOCK)]
            if nested:
                scales = _scales(scales, first // NESTED_BLOCK, *nested)
            codes = packed[start // 2 : start // 2 + (count + 1) // 2]
            shape = [count // BLOCK, BLOCK] if count % BLOCK == 0 else [count]
            # without a name, so that it is gone before the next chunk
            chunk.copy_(load_operators().dequantize_4bit(codes, scales, BLOCK, self.name, shape, out.dtype).view(-1))

    def file_parts(self, name: str, shape: tuple[int, ...], source: str) -> tuple[Part, ...]:
        """As bitsandbytes has it, not doubly quantized; the weight without its shape, which the quant state tells."""
        count = prod(shape)
        parts = (
            Part(name, "U8", ((count + 1) // 2, 1), held=(self.name.upper(), shape)),
            Part(f"{name}.absmax", "F32", (-(-count // BLOCK),)),
            Part(f"{name}.quant_map", "F32", (16,), known=self.code.numpy().tobytes()),
        )
        note = {"quant_type": self.name, "blocksize": BLOCK, "dtype": source, "shape": list(shape)}
        raw = json.dumps(note).encode()
        raw += b" " * (-(len(raw) + sum(part.nbytes for part in parts)) % ALIGNMENT)
        return (*parts, Part(f"{name}.quant_state.bitsandbytes__{self.name}", "U8", (len(raw),), known=raw))

    @property
    def code(self) -> Tensor:
        """The 16 numbers that the codes stand for, fp32, as bitsandbytes writes them beside its weights."""
        return _four_bit_code(self.name)

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        if on_host:  # which bitsandbytes allocates by itself: a chunk in fp32 at the most, and its scales
            return min(prod(shape), CHUNK_WEIGHTS) * 5
        return padded(-(-prod(shape) // BLOCK) * 4)  # scales, where they are quantized, too


def _scales(codes: Tensor, first: int, nested: Tensor, code: Tensor, offset: Tensor) -> Tensor:
    """The scales that `codes` store in uint8; `first` is the nested block that they begin with."""
    absmax = nested[first : first + -(-len(codes) // NESTED_BLOCK)]
    return load_operators().dequantize_blockwise(codes, absmax, code, NESTED_BLOCK, torch.float32).add_(offset)


@cache
def load_operators() -> Any:
    """bitsandbytes' operators. Raises MissingPackage."""
    bitsandbytes()
    return torch.ops.bitsandbytes


@cache
def _dynamic_code() -> Tensor:
    code: Tensor = bitsandbytes().create_dynamic_map()
    return code


@cache
def _four_bit_code(name: str) -> Tensor:
    code: Tensor = bitsandbytes().get_4bit_type(name, device="cpu")
    return code


NF4, FP4 = Bnb4Codec("nf4"), Bnb4Codec("fp4")
_OF_DTYPE = {codec.name.upper(): codec for codec in (NF4, FP4)}


class Bnb4(Format):
    """nf4 and fp4, told by their quant states."""

    dtypes = _OF_DTYPE.keys()
    codecs = (NF4, FP4)
    encoders = (NF4, FP4)

    def describe(self, tensors: Tensors, metadata: Mapping[str, str], path: Path) -> Tensors:
        return with_quant_states(tensors)

    def recognise(self, name: str, tensors: Tensors) -> StoredParam:
        data = tensors[name]
        found = (tensors.get(f"{name}.{scale}") for scale in _SCALES)
        parts = (data, *(scale for scale in found if scale))
        return StoredParam(
            name, data.shape, _OF_DTYPE[data.dtype], parts, tile_rows=prod(data.shape[:1])
        )  # blocks run on over rows

    def raw_layout(self, part: TensorEntry) -> Layout:
        return torch.uint8, (part.nbytes,)


def with_quant_states(tensors: Tensors) -> dict[str, TensorEntry]:
    """The tensors, with every 4-bit weight as dtype NF4 or FP4 in its true shape instead of U8 in none.

    A doubly quantized weight also gets `<name>.nested_offset`, a number that its file states as text. Raises
    DamagedFile where a note and its tensors disagree, WrongModel for another block size, MissingPackage where there are
    such weights and bitsandbytes is not there.
    """
    result = dict(tensors)
    notes = {name: match for name in tensors if (match := _NOTE.fullmatch(name)) and match[1] in tensors}
    if notes:
        load_operators()
    for name, note in read_notes({name: tensors[name] for name in notes}).items():
        result |= _described(tensors, notes[name][1], notes[name][2], note)
        del result[name]
    return result


def _described(tensors: Tensors, name: str, kind: str, note: Mapping[str, Any]) -> dict[str, TensorEntry]:
    entry, shape, offset = tensors[name], note.get("shape"), note.get("nested_offset")
    file = entry.file
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise DamagedFile(
            "{file}: the quant state of {name!r} has the shape {shape!s:.99}. Download it again.",
            code="bnb4.wrong_shape",
            file=file,
            name=name,
            shape=shape,
        )
    nested = f"{name}.nested_absmax" in tensors
    blocks = (note.get("blocksize"), note.get("nested_blocksize", NESTED_BLOCK))
    if note.get("quant_type") != kind or blocks != (BLOCK, NESTED_BLOCK):
        raise WrongModel(
            "{file}: {name!r} is stored in bitsandbytes' {kind!r:.20} with blocks of {blocks!s:.40}, which is not "
            "supported. Use a file with blocks of ({block}, {nested_block}), bitsandbytes' defaults.",
            code="bnb4.unsupported_blocks",
            file=file,
            name=name,
            kind=note.get("quant_type"),
            blocks=blocks,
            block=BLOCK,
            nested_block=NESTED_BLOCK,
        )
    scales = -(-prod(shape) // BLOCK)
    expected = {"absmax": ("U8" if nested else "F32", scales)}
    if nested:
        expected |= {"nested_absmax": ("F32", -(-scales // NESTED_BLOCK)), "nested_quant_map": ("F32", 256)}
    found = {part: tensors.get(f"{name}.{part}") for part in expected}
    fits = all((e.dtype, prod(e.shape)) == expected[part] if e else False for part, e in found.items())
    stated = not nested or (isinstance(offset, int | float) and abs(offset) < MAX_OFFSET)
    if not fits or not stated or entry.nbytes != (prod(shape) + 1) // 2:
        raise DamagedFile(
            "{file}: {name!r} and its scales do not match its quant state ({shape!s:.99} in {kind}). Download it "
            "again.",
            code="bnb4.broken_state",
            file=file,
            name=name,
            shape=shape,
            kind=kind,
        )
    result = {name: replace(entry, dtype=kind.upper(), shape=tuple(shape))}
    if nested:
        result[f"{name}.nested_offset"] = TensorEntry(file, 0, 4, "F32", (), data=struct.pack("<f", offset))
    return result
