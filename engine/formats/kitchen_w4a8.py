"""ComfyUI's asym_w4a8_int8: 4-bit codes of a codebook, rotated, with scales by group and row; through comfy-kitchen.

"w4a8" names how ComfyUI multiplies with it; here what is multiplied with the weight is not quantized.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chunks import even_rows
from .int8_convrot import INT8_CONVROT

# what the parts behind the data are called beside `<layer>.`; a file without a codebook has evenly spaced numbers
W4A8_PARTS = ("weight_s_rel", "weight_s_channel", "weight_codebook")


@dataclass(frozen=True)
class W4a8Codec:
    """Three or four parts: codes (N, K / 2), scales by group (N, K / group size) in fp8 or fp32 and by row (N,), and
    the codebook's 16 numbers. `group`: neighbours of a row that were rotated together.

    Bit-equal to comfy-kitchen's own dequantization to the compute dtype; in chunks of rows.
    """

    group: int

    @property
    def name(self) -> str:
        return f"asym_w4a8_int8_{self.group}"

    def decode_into(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        data, by_group, by_row, *codebook = parts
        if by_group.dtype == torch.uint8:  # fp8 as bytes
            by_group = by_group.view(torch.float8_e4m3fn)
        dequantize, count = load_w4a8(), even_rows(out.shape)
        for start in range(0, len(out), count):
            rows = slice(start, start + count)
            chunk = dequantize(
                data[rows],
                by_group[rows],
                by_row.view(-1)[rows],
                codebook=codebook[0] if codebook else None,
                group_size=out.shape[1] // by_group.shape[1],
                convrot_groupsize=self.group,
                output_dtype=out.dtype,
            )
            out[rows].copy_(chunk)
            del chunk  # before the next one is made

    def scratch_bytes(self, shape: Sequence[int]) -> int:
        # the library's own form for any device: codes as 32-bit integers and as numbers of the codebook
        return even_rows(shape) * shape[1] * 24 + self.group**2 * 8


def load_w4a8() -> Any:
    """comfy-kitchen's dequantization. Raises ImportError or AttributeError where it is missing or too old."""
    import comfy_kitchen

    return comfy_kitchen.dequantize_w4a8_int8_weight


W4A8: Mapping[str, W4a8Codec] = {f"ASYM_W4A8_INT8_{group}": W4a8Codec(group) for group in INT8_CONVROT}
