"""Cards by their data sheets, and Qwen-Image's real sizes in the formats that people have, from headers alone."""

from dataclasses import dataclass
from functools import cache

import full_size
import full_size_21
import full_size_qwen3_vl
import torch
from full_size_formats import in_format
from qwenimage_lowvram.engine.models.families import QWEN_IMAGE, QWEN_IMAGE_21
from qwenimage_lowvram.engine.models.family import Family
from qwenimage_lowvram.engine.planning.cards import CARD_OF_GB, DataSheet
from qwenimage_lowvram.engine.planning.forecast import Speeds
from qwenimage_lowvram.engine.planning.request import GIB
from qwenimage_lowvram.engine.planning.stages import ImageModels

# what the context, the screen and the loader's headroom leave
AWAY_BYTES = 600_000_000 + 400_000_000


@dataclass(frozen=True)
class SimulatedCard:
    """A card in a machine. disk_gb: GB/s of its disk; ram_gib: of its RAM, for held blocks. dtype: what is computed in
    on the card."""

    sheet: DataSheet
    disk_gb: float
    ram_gib: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.sheet.name} {self.sheet.gb} GB"

    @property
    def speeds(self) -> Speeds:
        return self.sheet.speeds(self.disk_gb * 1e9)

    @property
    def limit_bytes(self) -> int:
        return self.sheet.gb * GIB - AWAY_BYTES


# cards before Ampere have no bf16: the pack computes in fp32 there
CARDS = (
    SimulatedCard(CARD_OF_GB[4], 0.5, ram_gib=10),
    SimulatedCard(DataSheet("RTX 2060", 6, 6.5, 336, 12), 3.5, ram_gib=24, dtype=torch.float32),
    SimulatedCard(CARD_OF_GB[12], 3.5, ram_gib=24),
    SimulatedCard(DataSheet("RTX 4060 laptop", 8, 29.0, 256, 12), 3.5, ram_gib=24),
    SimulatedCard(CARD_OF_GB[16], 3.5, ram_gib=24),
    SimulatedCard(DataSheet("RTX 5060", 8, 38.0, 448, 24), 3.5, ram_gib=24),
)
FORMATS = ("bf16", "fp8", "int8", "int8_convrot", "nf4", "GGUF Q4_K")
FORMATS_21 = ("bf16", "int8_convrot", "nf4")


@cache
def models(weight_format: str, dtype: torch.dtype, family: Family = QWEN_IMAGE) -> ImageModels:
    """Transformer in that format, text encoder in fp8, VAE; computed with in `dtype`."""
    hardware = full_size.fake_gpu()
    transformer, text, vae = _CHECKPOINTS[family.transformer]
    parts = family.parts(in_format(transformer(), weight_format), dtype=dtype, hardware=hardware)
    return ImageModels(
        family.encoder(text(torch.float8_e4m3fn), dtype=dtype, hardware=hardware).footprint,
        parts.footprint,
        family.empty_vae(vae(), dtype=dtype).footprint,
    )


_CHECKPOINTS = {
    QWEN_IMAGE.transformer: (
        full_size.transformer_checkpoint,
        full_size.text_encoder_checkpoint,
        full_size.vae_checkpoint,
    ),
    QWEN_IMAGE_21.transformer: (
        full_size_21.transformer_21_checkpoint,
        full_size_qwen3_vl.text_encoder_checkpoint,
        full_size_21.vae_21_checkpoint,
    ),
}
