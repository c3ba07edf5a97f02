"""The VAE against diffusers' own, and tiles against the whole, on random weights with strong attention."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import DamagedFile, InvalidRequest, WrongModel
from qwenimage_lowvram.engine.models.qwen_image_vae.image_vae import ImageVAE
from qwenimage_lowvram.engine.planning.tile_geometry import reach
from small_checkpoint import make_vae
from split_files import wan_vae_name
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

# height x width in latents: wide, tall, odd
SIZES = [(9, 60), (57, 8), (31, 45)]


def make_lively_vae(base_dim: int = 8, seed: int = 1, attention_gain: float = 3.0, channels: int = 3) -> Any:
    """diffusers' VAE whose output uses the range and whose attention mixes the whole image."""
    vae = make_vae(base_dim=base_dim, seed=seed, channels=channels)
    for name, parameter in vae.named_parameters():
        if parameter.ndim >= 4 and not name.endswith("gamma"):
            # of a causal kernel's time taps one alone meets the frame
            taps = parameter.shape[2] if parameter.ndim == 5 else 1
            parameter.data *= (1.6 * taps) ** 0.5
        if "to_qkv.weight" in name:
            parameter.data *= attention_gain
    vae.decoder.conv_out.weight.data *= 0.25
    return vae


def reference_decode(vae: Any, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return (vae.decode(latents).sample[:, :, 0].permute(0, 2, 3, 1).float() + 1) / 2


def reference_encode(vae: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return vae.encode(images.permute(0, 3, 1, 2)[:, :, None] * 2 - 1).latent_dist.mode()


def random_latents(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_images(*shape: int, seed: int = 7) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def theirs() -> Any:
    return make_lively_vae()


@pytest.fixture(scope="module")
def ours(theirs: Any) -> ImageVAE:
    return ImageVAE.from_state_dict(theirs.state_dict(), dtype=torch.float32)


@pytest.fixture(scope="module")
def mild() -> tuple[Any, ImageVAE]:
    """Theirs and ours with weaker attention: a strong one amplifies the fp32 rounding of whoever runs it."""
    theirs = make_lively_vae(attention_gain=1.0)
    return theirs, ImageVAE.from_state_dict(theirs.state_dict(), dtype=torch.float32)


@pytest.fixture(scope="module")
def exact(theirs: Any) -> ImageVAE:
    """In fp64, whose rounding the fp32 result cannot show."""
    return ImageVAE.from_state_dict(theirs.state_dict(), dtype=torch.float64)


@pytest.mark.slow
def test_a_decode_equals_diffusers(theirs: Any, exact: ImageVAE) -> None:
    latents = random_latents(2, 16, 1, 23, 30)
    images = exact.decode(latents)
    expected = reference_decode(theirs.double(), latents.double())
    theirs.float()
    assert images.shape == (2, 184, 240, 3)
    assert images.dtype == torch.float32
    assert expected.std() > 0.05
    torch.testing.assert_close(images, expected, rtol=1e-7, atol=1e-7)


def test_a_decode_in_fp32_equals_diffusers_within_3e_6(mild: tuple[Any, ImageVAE]) -> None:
    theirs, ours = mild
    latents = random_latents(2, 16, 1, 23, 30)
    # 3e-6 in diffusers' -1..1
    assert (ours.decode(latents) - reference_decode(theirs, latents)).abs().max() < 1.5e-6


@pytest.mark.slow
def test_an_encode_equals_diffusers(theirs: Any, exact: ImageVAE) -> None:
    images = random_images(2, 184, 248, 3)
    latents = exact.encode(images)
    expected = reference_encode(theirs.double(), images.double())
    theirs.float()
    assert latents.shape == (2, 16, 1, 23, 31)
    torch.testing.assert_close(latents, expected.float(), rtol=2e-7, atol=2e-7)


def test_an_encode_in_fp32_equals_diffusers_within_a_millionth_of_its_range(mild: tuple[Any, ImageVAE]) -> None:
    theirs, ours = mild
    images = random_images(1, 128, 128, 3)
    expected = reference_encode(theirs, images)
    assert (ours.encode(images) - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tile_px", [64, 136, 200])
def test_tiled_equals_untiled(exact: ImageVAE, size: tuple[int, int], tile_px: int) -> None:
    latents = random_latents(1, 16, 1, *size)
    images = random_images(1, size[0] * 8, size[1] * 8, 3)
    assert len(exact.plan_decode(size[0] * 8, size[1] * 8, tile_px=64)) > 1
    torch.testing.assert_close(exact.decode(latents, tile_px=tile_px), exact.decode(latents), rtol=1e-7, atol=6e-8)
    torch.testing.assert_close(exact.encode(images, tile_px=tile_px), exact.encode(images), rtol=2e-7, atol=2e-7)


@pytest.mark.slow
@pytest.mark.parametrize("tile_px", [64, 136])
def test_tiled_equals_untiled_in_fp32_within_1e_6(mild: tuple[Any, ImageVAE], tile_px: int) -> None:
    _, vae = mild
    latents, images = random_latents(1, 16, 1, 31, 45), random_images(1, 248, 360, 3)
    assert (vae.decode(latents, tile_px=tile_px) - vae.decode(latents)).abs().max() < 1e-6
    whole = vae.encode(images)
    assert (vae.encode(images, tile_px=tile_px) - whole).abs().max() < 1e-6 * whole.abs().max()


@pytest.mark.slow
def test_blended_tiles_would_fail_here(mild: tuple[Any, ImageVAE]) -> None:
    theirs, ours = mild
    latents = random_latents(1, 16, 1, 34, 40)
    whole = reference_decode(theirs, latents)
    theirs.enable_tiling(256, 256, 192, 192)
    blended = reference_decode(theirs, latents)
    theirs.use_tiling = False
    assert (ours.decode(latents, tile_px=192) - whole).abs().max() < 3e-6
    assert (blended - whole).abs().max() > 0.01


@pytest.mark.slow
def test_a_decode_under_a_limit_equals_one_without(ours: ImageVAE) -> None:
    latents = random_latents(1, 16, 1, 40, 60)
    limit = ours.plan_decode(320, 480).peak_bytes // 2
    assert len(ours.plan_decode(320, 480, limit)) > 1
    assert (ours.decode(latents, limit_bytes=limit) - ours.decode(latents)).abs().max() < 1e-6


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("side", ["before", "after"])
def test_the_decoder_reads_its_whole_halo_and_nothing_beyond(exact: ImageVAE, axis: int, side: str) -> None:
    network = exact.decoder.network
    core, length = (30, 33), 64
    edge = core[0] - network.halo.before if side == "before" else core[1] - 1 + network.halo.after
    for position, reaches in ((edge, True), (edge + (-1 if side == "before" else 1), False)):
        features = torch.zeros((1, network.features, 3, 3), dtype=torch.float64)
        shape = [1, network.features, 3, 3]
        shape[axis] = length
        features = torch.randn(shape, dtype=torch.float64)
        features.select(axis, position).fill_(torch.nan)
        pixels = run(exact.decoder.local, features).narrow(axis, core[0] * 8, (core[1] - core[0]) * 8)
        assert bool(pixels.isnan().any()) is reaches


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("side", [0, 1])
def test_the_encoder_reads_its_whole_halo_and_nothing_beyond(exact: ImageVAE, axis: int, side: int) -> None:
    network = exact.encoder.network
    core, length = (16, 18), 40
    edges = reach(network.local, core[0], core[1] - 1)
    for position, reaches in ((edges[side], True), (edges[side] + (2 * side - 1), False)):
        shape = [1, 3, 24, 24]
        shape[axis] = length * 8
        pixels = torch.randn(shape, dtype=torch.float64)
        pixels.select(axis, position).fill_(torch.nan)
        features = run(exact.encoder.local, pixels).narrow(axis, core[0], core[1] - core[0])
        assert bool(features.isnan().any()) is reaches
    # and a tile, cut at whole latents, holds that reach
    assert (core[0] - network.halo.before) * 8 <= edges[0]
    assert edges[1] < (core[1] + network.halo.after) * 8


def run(layers: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        for layer in layers:
            x = layer(x)
    return x


@pytest.mark.slow
def test_attention_in_chunks_equals_attention_at_once(ours: ImageVAE) -> None:
    attention = ours.decoder.whole[3].double()
    x = torch.randn(1, 32, 91, 97, dtype=torch.float64)  # more tokens than a chunk of queries or of keys has
    qkv = F.conv2d(attention.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), attention.qkv.weight, attention.qkv.bias)
    q, k, v = qkv.flatten(2).transpose(1, 2).chunk(3, dim=-1)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    expected = x + F.conv2d(mixed, attention.proj.weight, attention.proj.bias)
    with torch.no_grad():
        # it works in place, on pixels whose channels lie together
        result = attention(x.clone(memory_format=torch.channels_last))
    ours.float()
    torch.testing.assert_close(result, expected)


@pytest.mark.slow
def test_bf16_errs_no_more_than_diffusers_bf16() -> None:
    # over several models, because which rounding is luckier differs from one to the next
    mine, others = 0.0, 0.0
    for seed in range(3):
        reduced = make_lively_vae(base_dim=16, seed=seed).bfloat16()
        ours = ImageVAE.from_state_dict(reduced.state_dict(), dtype=torch.bfloat16)
        latents = random_latents(1, 16, 1, 16, 20, seed=seed).bfloat16()
        result = reference_decode(reduced, latents)
        expected = reference_decode(reduced.float(), latents.float())
        mine += float((ours.decode(latents.float()) - expected).pow(2).mean())
        others += float((result - expected).pow(2).mean())
    assert 0 < mine <= others


@pytest.mark.slow
def test_fp16_that_overflows_runs_again_in_fp32_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    theirs = make_lively_vae()
    theirs.decoder.conv_in.weight.data *= 3e4
    latents = random_latents(2, 16, 1, 12, 12).half().float()
    vae = ImageVAE.from_state_dict(theirs.state_dict(), dtype=torch.float16)
    with caplog.at_level(logging.WARNING):
        images = vae.decode(latents, tile_px=64)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "float32" in caplog.text
    assert (images - reference_decode(theirs.half().float(), latents)).abs().max() < 1e-5


def test_fp16_that_stays_finite_runs_once(theirs: Any, caplog: pytest.LogCaptureFixture) -> None:
    vae = ImageVAE.from_state_dict(theirs.state_dict(), dtype=torch.float16)
    calls: list[tuple[int, int]] = []
    with caplog.at_level(logging.WARNING):
        vae.decode(random_latents(2, 16, 1, 12, 12), tile_px=64, on_tile=lambda *call: calls.append(call))
    assert not caplog.records
    total = 2 * len(vae.plan_decode(96, 96, tile_px=64))
    assert calls == [(done, total) for done in range(1, total + 1)]


@pytest.mark.slow
def test_out_of_memory_costs_smaller_tiles_and_not_the_image(ours: ImageVAE) -> None:
    latents = random_latents(1, 16, 1, 40, 60)
    totals: list[int] = []

    def fail_once(done: int, total: int) -> None:
        totals.append(total)
        if len(totals) == 1:
            raise torch.OutOfMemoryError

    images = ours.decode(latents, on_tile=fail_once)
    assert totals[0] == 1 < totals[1]
    assert (images - ours.decode(latents)).abs().max() < 1e-6


def test_what_the_callback_raises_ends_the_work(ours: ImageVAE) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours.decode(random_latents(1, 16, 1, 8, 8), on_tile=interrupt)


def test_a_batch_equals_its_images_one_by_one(ours: ImageVAE) -> None:
    latents, images = random_latents(3, 16, 1, 9, 12), random_images(3, 72, 96, 3)
    assert torch.equal(ours.decode(latents), torch.cat([ours.decode(one[None]) for one in latents]))
    assert torch.equal(ours.encode(images), torch.cat([ours.encode(one[None]) for one in images]))


def test_latents_may_come_without_a_time_axis(ours: ImageVAE) -> None:
    latents = random_latents(1, 16, 1, 8, 9)
    assert torch.equal(ours.decode(latents[:, :, 0]), ours.decode(latents))


def test_inputs_are_left_as_they_were(ours: ImageVAE) -> None:
    latents, images = random_latents(1, 16, 1, 8, 9), random_images(1, 64, 72, 3)
    kept = latents.clone(), images.clone()
    ours.decode(latents)
    ours.encode(images)
    assert torch.equal(latents, kept[0])
    assert torch.equal(images, kept[1])


def test_comfyui_names_give_the_same_vae(theirs: Any, ours: ImageVAE) -> None:
    renamed = {wan_vae_name(name): tensor for name, tensor in theirs.state_dict().items()}
    vae = ImageVAE.from_state_dict(renamed, dtype=torch.float32)
    assert "decoder.upsamples.0.residual.0.gamma" in renamed
    assert len(vae.state_dict()) == len(ours.state_dict())
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in vae.state_dict().items())


def test_weights_are_copies(theirs: Any) -> None:
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    vae = ImageVAE.from_state_dict(state, dtype=torch.float32)
    latents = random_latents(1, 16, 1, 6, 6)
    before = vae.decode(latents)
    for tensor in state.values():
        tensor.fill_(torch.nan)
    assert torch.equal(vae.decode(latents), before)


def _of_alpha_alone() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(base_dim=8, input_channels=1).state_dict()


def _qwen_image_2_1() -> Any:
    try:
        from diffusers import AutoencoderKLQwenImage21
    except ImportError:
        pytest.skip("diffusers has Qwen-Image-2.1's VAE from 0.42 on")
    return AutoencoderKLQwenImage21(base_dim=8, decoder_base_dim=8).state_dict()


def _wan_2_2() -> Any:
    return {"decoder.conv1.weight": torch.empty(8, 48, 3, 3, 3), "decoder.upsamples.0.upsamples.0.x": torch.empty(1)}


def _flux() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(32,), latent_channels=16).state_dict()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_of_alpha_alone, "reads 1 channels, draws 1"),
        (_qwen_image_2_1, "2.1"),
        (_wan_2_2, "Wan 2.2"),
        (_flux, "Stable Diffusion or Flux"),
        (dict, "0 tensors"),
    ],
    ids=["alpha alone", "2.1", "wan 2.2", "flux", "empty"],
)
def test_another_vae_is_refused_by_name(make: Callable[[], Any], words: str) -> None:
    with torch.device("meta"):
        state = make()
    with pytest.raises(WrongModel, match=words):
        ImageVAE.from_state_dict(state, dtype=torch.float32)


def test_a_missing_tensor_is_named(theirs: Any) -> None:
    state = theirs.state_dict()
    del state["decoder.up_blocks.1.resnets.2.conv1.bias"]
    with pytest.raises(DamagedFile, match=r"up_blocks\.1\.resnets\.2\.conv1\.bias"):
        ImageVAE.from_state_dict(state, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(1, 16, 3, 8, 8), (1, 4, 1, 8, 8), (16, 8, 8), (0, 16, 1, 8, 8)], ids=str)
def test_latents_of_another_kind_are_refused(ours: ImageVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match="16"):
        ours.decode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 64, 64, 4), (64, 64, 3), (1, 60, 64, 3), (1, 64, 4, 3)], ids=str)
def test_images_of_another_kind_are_refused(ours: ImageVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest):
        ours.encode(torch.zeros(shape))


def test_operations_of_decoding_are_those_that_torch_counts(ours: ImageVAE) -> None:
    with FlopCounterMode(display=False) as counter:
        ours.decode(random_latents(1, 16, 24, 32))
    # the borders of a merged kernel's positions, and steps of attention that are no product
    assert ours.decode_flops(192, 256) == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert ours.decode_flops(192, 256, 1.5) < 1.5 * ours.decode_flops(192, 256)
