"""What bitsandbytes notes beside its 4-bit weights: their true shapes, and an offset. Reads those notes, no weight."""

import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from ..errors import DamagedFile, WrongModel
from ..files.checkpoint import TensorEntry
from .bnb4 import BLOCK, NESTED_BLOCK, load_operators
from .notes import read_notes

# JSON as bytes, written by bitsandbytes/functional.py (QuantState.as_dict)
_NOTE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
MAX_OFFSET = 1e30  # the mean of scales; a larger number is no fp32


def with_quant_states(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
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


def _described(
    tensors: Mapping[str, TensorEntry], name: str, kind: str, note: Mapping[str, Any]
) -> dict[str, TensorEntry]:
    entry, shape, offset = tensors[name], note.get("shape"), note.get("nested_offset")
    file = entry.file
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise DamagedFile(f"{file}: the quant state of {name!r} has the shape {shape!s:.99}. Download it again.")
    nested = f"{name}.nested_absmax" in tensors
    blocks = (note.get("blocksize"), note.get("nested_blocksize", NESTED_BLOCK))
    if note.get("quant_type") != kind or blocks != (BLOCK, NESTED_BLOCK):
        raise WrongModel(
            f"{file}: {name!r} is stored in bitsandbytes' {note.get('quant_type')!r:.20} with blocks of "
            f"{blocks!s:.40}, which is not supported. Use one with blocks of ({BLOCK}, {NESTED_BLOCK}), "
            "bitsandbytes' defaults."
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
            f"{file}: {name!r} and its scales are not what its quant state promises, {shape!s:.99} in {kind}. "
            "Download it again."
        )
    result = {name: replace(entry, dtype=kind.upper(), shape=tuple(shape))}
    if nested:
        result[f"{name}.nested_offset"] = TensorEntry(file, 0, 4, "F32", (), data=struct.pack("<f", offset))
    return result
