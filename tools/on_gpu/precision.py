"""Rows of a card for the table of what the numbers of the weights cost: steps of blocks of the real size."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cases import OURS, STORED, STORED_LORA, Case, Sizes

# the file's format, and how it is computed where that is not exactly. In fp32 the blocks are 82 GB: no row
FORMATS: Mapping[str, tuple[str, str]] = {
    "BF16": ("bf16", ""),
    "FP8 scaled": ("fp8 scaled", ""),
    "INT8 by row, exact": ("int8", ""),
    "INT8 by row, fast": ("int8", STORED),
    "INT8 rotated, exact": ("int8_convrot", ""),
    "INT8 rotated, fast": ("int8_convrot", STORED),
    "INT8 rotated, fast, LoRA": ("int8_convrot", STORED_LORA),
    "INT4 (nf4)": ("nf4", ""),
    "INT4 (GGUF Q4_K)": ("GGUF Q4_K", ""),
}
CARD_GB, ROW_SECONDS = 8, 600.0  # the card that is emulated, and what each row may take
_TOLD = ("seconds", "peak_bytes", "why")


def on_card(
    folder: Path, sizes: Sizes, device: str, measure: Callable[[dict[str, Any]], Iterator[Mapping[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """What `measure` (`blocks.do`) tells of each; why a row has no numbers stands in it."""
    blocks = folder / "blocks"
    blocks.mkdir()
    for name, (stored, how) in FORMATS.items():
        case = Case(OURS, stored, sizes.sides[1], True, CARD_GB, how)
        job = {"folder": str(blocks), "device": device, "sizes": sizes.to_json(), "case": asdict(case)}
        (row,) = measure(job | {"seconds": ROW_SECONDS})
        numbers = {key: row[key] for key in _TOLD if key in row}
        yield {"who": name, "case": f"{sizes.blocks} blocks, {case}", **numbers, "error_mean": row.get("difference")}
