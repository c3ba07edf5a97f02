"""At its real size, on fake tensors, Qwen3-VL-8B takes the memory that the plan says, and a 4 GB card has that."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import full_size
import pytest
import torch
from full_size_qwen3_vl import HIDDEN, text_encoder_checkpoint
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.models.qwen3_vl.costs import Qwen3VisionFootprint
from qwenimage_lowvram.engine.models.qwen3_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_vl.image_prompts import IMAGE
from qwenimage_lowvram.engine.models.qwen_vl.images import SeenImage
from qwenimage_lowvram.engine.planning.request import GIB
from qwenimage_lowvram.engine.planning.text_encoder import plan_text_encoder, text_encoder_peak_bytes
from qwenimage_lowvram.engine.planning.vision import plan_vision, vision_peak_bytes
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.slow
SIDE = 32  # tokens of 1024 px
WORDS = (300, 12)


@pytest.fixture
def live() -> Iterator[LiveBytes]:
    with FakeTensorMode(), LiveBytes("cuda") as live, torch.inference_mode():
        yield live


class _EmbeddedEncoder(TextEncoder):
    """Rows of the embedding are read from a file, and there is none here."""

    def _embed(self, prompts: Sequence[Sequence[int]], images: Any) -> list[torch.Tensor]:
        sizes = [len(ids) + (SIDE**2 - 1) * ids.count(IMAGE) for ids in prompts]
        return [torch.empty(1, size, HIDDEN, device="cuda", dtype=torch.bfloat16) for size in sizes]


def make_encoder(stored: torch.dtype, **hardware: Any) -> _EmbeddedEncoder:
    return _EmbeddedEncoder(
        text_encoder_checkpoint(stored, layers=5),  # which take as much as 36
        dtype=torch.bfloat16,
        hardware=replace(full_size.fake_gpu(), **hardware),
        source=full_size.EmptySource,
    )


def shown(count: int) -> list[SeenImage]:
    made = [torch.empty(SIDE**2, HIDDEN, dtype=torch.bfloat16) for _ in range(4)]
    return [SeenImage(made[0], SIDE, SIDE, tuple(made[1:]))] * count


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("references", "most"), [(0, 1.0e9), (1, 1.2e9), (3, 1.4e9), (10, 2.3e9)])
def test_the_text_encoder_takes_what_the_plan_says(
    references: int, most: float, stored: torch.dtype, live: LiveBytes
) -> None:
    encoder = make_encoder(stored)
    prompts = [[1] * words + [IMAGE] * references for words in WORDS]
    images = [shown(references)] * len(prompts)
    states = encoder.encode(prompts, images=images)
    lengths = [words + references * SIDE**2 for words in WORDS]
    assert [state.shape for state in states] == [(1, length, HIDDEN) for length in lengths]
    predicted = text_encoder_peak_bytes(encoder.footprint, lengths, 2)
    assert 0.9 * predicted < live.peak <= predicted < most
    assert live.now == 0


def test_scores_take_what_is_planned() -> None:
    """On a device without a fused kernel for attention."""
    with FakeTensorMode(), LiveBytes("cuda", fused=False) as live, torch.inference_mode():
        encoder = make_encoder(torch.bfloat16, fused_shared_attention=frozenset())
        encoder.encode([[1] * 300 + [IMAGE]], images=[shown(1)])
        predicted = text_encoder_peak_bytes(encoder.footprint, (300 + SIDE**2,), 2)
        assert 0.85 * predicted < live.peak < 1.02 * predicted


# the vision part of the 8B, in bf16; what a pass takes is measured at its real width in test_qwen3_vl.py
EYES = Qwen3VisionFootprint(
    blocks=27, slot_bytes=30_500_000, staging_bytes=0, scratch_bytes=0, stored_bytes=30_500_000, ring_bytes=0,
    host=False, outside_bytes=330_000_000, patch_values=1536, hidden_size=1152, intermediate_size=4304, head_dim=72,
    merge=2, out_hidden_size=HIDDEN, element_bytes=2,
)  # fmt: skip


@pytest.mark.parametrize(("references", "most"), [(1, 0.6e9), (3, 0.65e9), (10, 0.75e9)])
def test_looking_takes_less_than_encoding_whatever_the_number_of_images(references: int, most: float) -> None:
    patches = [4 * SIDE**2] * references
    assert vision_peak_bytes(EYES, patches, 2) < most
    assert plan_vision(EYES, patches, int(most)) == 2


def test_ten_references_fit_a_4_gb_card() -> None:
    encoder = make_encoder(torch.bfloat16)
    assert plan_text_encoder(encoder.footprint, [words + 10 * SIDE**2 for words in WORDS], int(3.4 * GIB)) == 2
