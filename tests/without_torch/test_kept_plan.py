"""Plans of networks whose prompts and references are made once: where that is kept, and what it takes."""

import pytest
from qwenimage_lowvram.engine.models.qwen_image_21.costs import QwenImage21Footprint
from qwenimage_lowvram.engine.planning.draft import least_bytes, most_bytes, most_ram_bytes
from qwenimage_lowvram.engine.planning.kept import KeptTiers, choices
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.request import GIB, Limits, SamplingRequest

BLOCK = 218_104_064
INT8 = QwenImage21Footprint(
    blocks=32, slot_bytes=2 * BLOCK, stored_bytes=BLOCK, staging_bytes=BLOCK // 4, native=False,
    outside_bytes=271_646_720, inner_dim=4096, element_bytes=2, ring_bytes=2**27,
)  # fmt: skip
TEXT = SamplingRequest(1024, 1024, 1, 300, timesteps=40)
EDIT = SamplingRequest(1024, 1024, 1, 300, 4096, timesteps=40)
EDITS = {
    "text": TEXT,
    "one": EDIT,
    "one with guidance": SamplingRequest(1024, 1024, 2, 300, 4096, timesteps=40),
    "three": SamplingRequest(1024, 1024, 1, 300, 3 * 4096, timesteps=40),
    "ten": SamplingRequest(1024, 1024, 1, 300, 10 * 4096, timesteps=40),
}


def test_a_token_takes_512_kib_in_all_blocks() -> None:
    assert 32 * INT8.kept_block_bytes(SamplingRequest(512, 512, 1, 1)) == 512 * 1024
    # references are shared by positive and negative prompt
    guided = SamplingRequest(1024, 1024, 2, 300, 4096)
    assert 32 * INT8.kept_block_bytes(guided) == (4096 + 600) * 512 * 1024
    assert 32 * INT8.kept_block_bytes(SamplingRequest(1024, 1024, 4, 300, prompts=1)) == 300 * 512 * 1024


@pytest.mark.parametrize("case", EDITS)
@pytest.mark.parametrize("ram_gib", [0.5, 2, 8, 64, None])
@pytest.mark.parametrize("vram_gib", [0, 1, 4, 12, 100])
def test_limits_are_kept_and_every_block_has_its_place(case: str, ram_gib: float | None, vram_gib: float) -> None:
    request = EDITS[case]
    limit = least_bytes(INT8, request) + int(vram_gib * GIB)
    ram = None if ram_gib is None else int(ram_gib * GIB)
    plan = plan_memory(INT8, request, Limits(limit, ram))
    kept = plan.kept
    assert plan.peak_bytes <= limit
    assert plan.ram_peak_bytes <= (most_ram_bytes(INT8, request) if ram is None else ram)
    assert sorted((*range(kept.remade), *kept.device, *kept.host)) == list(range(32))
    assert len(kept.device) == kept.on_device
    assert len(kept.host) == kept.in_host
    assert "kept for" in repr(plan)


@pytest.mark.parametrize("case", EDITS)
def test_more_memory_never_makes_a_step_slower(case: str) -> None:
    request = EDITS[case]
    for ram in (0.5, 3, 20):
        seconds = [
            plan_memory(
                INT8, request, Limits(least_bytes(INT8, request) + gib * GIB // 4, int(ram * GIB))
            ).forecast.seconds
            for gib in range(0, 60, 6)
        ]
        assert seconds == sorted(seconds, reverse=True)
    for vram in (0, 2, 8):
        limit = least_bytes(INT8, request) + vram * GIB
        seconds = [
            plan_memory(INT8, request, Limits(limit, gib * GIB // 2)).forecast.seconds for gib in range(1, 40, 6)
        ]
        assert seconds == sorted(seconds, reverse=True)


def test_with_memory_enough_nothing_is_made_anew() -> None:
    for request in EDITS.values():
        kept = plan_memory(INT8, request, Limits(most_bytes(INT8, request))).kept
        assert (kept.remade, kept.on_device) == (0, 32)
        in_ram = plan_memory(INT8, request, Limits(least_bytes(INT8, request) + 2**28, 64 * GIB)).kept
        assert in_ram.remade == 0


def test_a_step_with_a_kept_reference_is_forecast_faster_than_one_that_makes_it_anew() -> None:
    limit = least_bytes(INT8, EDIT) + 2**28
    kept = plan_memory(INT8, EDIT, Limits(limit, 64 * GIB))
    anew = plan_memory(INT8, EDIT, Limits(least_bytes(INT8, EDIT), INT8.ring_bytes))
    assert anew.kept.remade == 32
    assert kept.forecast.compute_seconds < 0.7 * anew.forecast.compute_seconds


def test_what_leaves_the_device_has_room_in_ram_where_there_is_some() -> None:
    plan = plan_memory(INT8, TEXT, Limits(most_bytes(INT8, TEXT), 64 * GIB))
    assert plan.kept.spare_bytes == 32 * INT8.kept_block_bytes(TEXT)
    assert plan_memory(INT8, TEXT, Limits(most_bytes(INT8, TEXT), INT8.ring_bytes)).kept.spare_bytes == 0


def test_networks_that_make_nothing_once_have_one_choice() -> None:
    assert list(choices(32, 0, 10**12, 10**12)) == [KeptTiers()]
    assert all(kept.in_host == 0 for kept in choices(32, 2**20, 10**12, None))
