"""Tiles of the full-size VAE: what the plan promises, and that live bytes keep it. Weights are meta tensors."""

import random

import pytest
import torch
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.errors import DoesNotFit, InvalidRequest
from qwenimage_lowvram.engine.models.qwen_image_vae.image_vae import ImageVAE
from qwenimage_lowvram.engine.planning.tile_geometry import Halo
from qwenimage_lowvram.engine.planning.tiles import Span, TilePlan

GB = 10**9


@pytest.fixture(scope="module")
def vae() -> ImageVAE:
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        return ImageVAE.from_state_dict(AutoencoderKLQwenImage().state_dict(), dtype=torch.bfloat16)


def live_peak(vae: ImageVAE, task: str, height: int, width: int, limit_bytes: int | None = None) -> int:
    """Live bytes beside the weights and the input, the result included."""
    shape = (1, 16, 1, height // 8, width // 8) if task == "decode" else (1, height, width, 3)
    source = torch.empty(shape, device="meta")
    with LiveBytes("meta") as live:
        source.view(shape)  # counted from here on
        getattr(vae, task)(source, limit_bytes=limit_bytes, out_device="meta")
    return live.peak - source.nbytes


def planned_peak(vae: ImageVAE, task: str, height: int, width: int, limit_bytes: int | None = None) -> int:
    result_bytes = 12 * height * width if task == "decode" else height * width
    plan: TilePlan = getattr(vae, f"plan_{task}")(height, width, limit_bytes, result_bytes=result_bytes)
    return plan.peak_bytes


def test_the_weights_are_91_mb_and_in_the_file_254(vae: ImageVAE) -> None:
    assert sum(parameter.nbytes for parameter in vae.parameters()) < 91 * 10**6


def test_the_halo_is_what_kernel_sizes_and_scales_add_up_to(vae: ImageVAE) -> None:
    assert vae.decoder.network.halo == Halo(13, 13)
    # 61 pixels to the left; to the right 68, because strided convolutions pad the end alone
    assert vae.encoder.network.halo == Halo(8, 9)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["decode", "encode"])
def test_1328_untiled_lives_in_800_bytes_per_pixel_as_planned(vae: ImageVAE, task: str) -> None:
    peak = live_peak(vae, task, 1328, 1328)
    planned = planned_peak(vae, task, 1328, 1328)
    assert peak <= 800 * 1328 * 1328
    assert 0.99 * peak <= planned <= 1.1 * peak


@pytest.mark.slow
@pytest.mark.parametrize("task", ["decode", "encode"])
def test_2048_lives_under_1_gb_as_planned(vae: ImageVAE, task: str) -> None:
    peak = live_peak(vae, task, 2048, 2048, GB)
    planned = planned_peak(vae, task, 2048, 2048, GB)
    assert peak <= GB
    assert 0.99 * peak <= planned <= 1.1 * peak


@pytest.mark.slow
def test_4096_lives_under_1_5_gb_as_planned(vae: ImageVAE) -> None:
    peak = live_peak(vae, "decode", 4096, 4096, 3 * GB // 2)
    assert peak <= 3 * GB // 2
    assert 0.99 * peak <= planned_peak(vae, "decode", 4096, 4096, 3 * GB // 2) <= 1.1 * peak


@pytest.mark.slow
def test_a_small_limit_is_kept_too(vae: ImageVAE) -> None:
    assert live_peak(vae, "decode", 768, 1024, 200 * 10**6) <= 200 * 10**6


def check_axis(spans: tuple[Span, ...], length: int, halo: Halo) -> None:
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == length
    for span in spans:
        assert span.start < span.stop
        assert span.read_start <= max(0, span.start - halo.before)
        assert span.read_stop >= min(length, span.stop + halo.after)
        assert span.read_start >= 0
        assert span.read_stop <= length


@pytest.mark.slow
@pytest.mark.parametrize("task", ["decode", "encode"])
def test_a_plan_writes_each_latent_once_reads_every_halo_and_never_exceeds_its_limit(vae: ImageVAE, task: str) -> None:
    network = vae.decoder.network if task == "decode" else vae.encoder.network
    choose = random.Random(3)
    fits = 0
    for _ in range(60):
        height, width = choose.randrange(1, 400), choose.randrange(1, 400)
        limit = choose.choice([None, choose.randrange(10**7, 2 * GB)])
        tile_px = choose.choice([0, 0, 8, 64, 512, 8192])
        try:
            plan: TilePlan = getattr(vae, f"plan_{task}")(height * 8, width * 8, limit, tile_px)
        except DoesNotFit:
            continue
        fits += 1
        check_axis(plan.rows, height, network.halo)
        check_axis(plan.columns, width, network.halo)
        assert limit is None or plan.peak_bytes <= limit
        if tile_px:
            inner = [span for axis in (plan.rows, plan.columns) for span in axis[1:-1]]
            assert all(span.stop - span.start <= max(1, tile_px // 8) for span in inner)
    assert fits > 40


def test_what_fits_is_not_tiled(vae: ImageVAE) -> None:
    whole = vae.plan_decode(1328, 1328)
    assert whole.is_whole
    assert vae.plan_decode(1328, 1328, whole.peak_bytes).is_whole
    assert not vae.plan_decode(1328, 1328, whole.peak_bytes - 1).is_whole


def test_a_long_image_is_cut_into_strips(vae: ImageVAE) -> None:
    plan = vae.plan_decode(768, 4096, GB)
    assert len(plan.rows) == 1 < len(plan.columns)


@pytest.mark.slow
def test_more_memory_never_costs_more_work(vae: ImageVAE) -> None:
    works = [vae.plan_decode(2048, 1536, mib * 2**20).work for mib in range(300, 2000, 50)]
    assert works == sorted(works, reverse=True)
    assert works[-1] == 1.0


def test_without_a_limit_no_tensor_needs_64_bit_indices(vae: ImageVAE) -> None:
    plan = vae.plan_decode(8192, 8192)
    reads = (
        max(span.read_stop - span.read_start for span in plan.rows),
        max(span.read_stop - span.read_start for span in plan.columns),
    )
    assert not plan.is_whole
    assert vae.decoder.network.largest_tensor(reads) < 2**31


def test_what_cannot_fit_is_refused_with_the_numbers(vae: ImageVAE) -> None:
    with pytest.raises(
        DoesNotFit, match=r"4096x4096 needs 0\.70 GiB .*; 0\.20 GiB are available\.\n.* 0\.50 GiB higher"
    ):
        vae.plan_decode(4096, 4096, 200 * 2**20)
    with pytest.raises(InvalidRequest, match="multiples of 8 pixels; got 100x64"):
        vae.plan_decode(64, 100)


def test_a_plan_prints_what_a_person_would_paste(vae: ImageVAE) -> None:
    assert repr(vae.plan_decode(928, 1664)) == "VAE decode 1664x928: whole image, 0.83 GiB"
    text = repr(vae.plan_decode(2048, 2048, GB))
    assert text == "VAE decode 2048x2048: 2x2 tiles, 1.21x the pixels, 0.74 GiB of 0.93 GiB"
