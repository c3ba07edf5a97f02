"""Qwen-Image-2.1's VAE: tiles that equal the whole, halos derived from kernels, memory as planned, files told."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.errors import DamagedFile, DoesNotFit, InvalidRequest, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.models.qwen_image_21_vae.image_vae import ImageVAE21
from qwenimage_lowvram.engine.models.qwen_image_21_vae.latent_statistics import normalised_latents, raw_latents
from qwenimage_lowvram.engine.models.qwen_image_21_vae.shapes import image_vae_21_shapes
from qwenimage_lowvram.engine.models.qwen_image_21_vae.tensor_names import require_image_vae_21
from qwenimage_lowvram.engine.models.qwen_image_vae.tensor_names import require_image_vae
from small_checkpoint import make_vae
from small_vae_21 import random_vae_21, wan_name, write_file, write_folder
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

PX = 16
BESIDE_WEIGHTS = 1_500_000_000 - 700_000_000
ENOUGH_TILES = 9  # with one that has neighbours on all sides


class _Seen(Exception):
    """Enough tiles have been made."""


def random(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vae() -> ImageVAE21:
    """In fp64, whose rounding the fp32 result cannot show."""
    return ImageVAE21.from_state_dict(random_vae_21(), dtype=torch.float64)


def real() -> ImageVAE21:
    """The published sizes, without weights."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in image_vae_21_shapes(96, 144).items()}
    return ImageVAE21.from_state_dict(tensors, dtype=torch.bfloat16)


def test_it_has_the_published_sizes() -> None:
    published = real()
    assert sum(p.numel() for p in published.decoder.parameters()) + sum(
        p.numel() for p in published.encoder.parameters()
    ) == pytest.approx(337.7e6, rel=0.03)  # less kernels over time, and the half of quant_conv that is no mean
    assert (published.scale, published.latent_channels, published.image_channels) == (PX, 64, 4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(4, 60), (58, 5)], ids=str)
def test_tiled_equals_untiled(vae: ImageVAE21, size: tuple[int, int]) -> None:
    latents = random(1, 64, *size)
    images = torch.rand((1, size[0] * PX, size[1] * PX, 4), generator=torch.Generator().manual_seed(1))
    assert len(vae.plan_decode(size[0] * PX, size[1] * PX, tile_px=32)) > 1
    torch.testing.assert_close(vae.decode(latents, tile_px=32), vae.decode(latents), rtol=1e-6, atol=1e-6)
    whole = vae.encode(images)
    assert len(vae.plan_encode(size[0] * PX, size[1] * PX, tile_px=32)) > 1
    torch.testing.assert_close(vae.encode(images, tile_px=32), whole, rtol=1e-6, atol=1e-6 * float(whole.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("axis", [2, 3])
def test_the_decoder_reads_its_whole_halo_and_nothing_beyond(vae: ImageVAE21, axis: int, side: str) -> None:
    half = vae.decoder
    halo, core, length = half.network.halo, (24, 25), 48
    edge = core[0] - halo.before if side == "before" else core[1] - 1 + halo.after
    for position, reaches in ((edge, True), (edge + (-1 if side == "before" else 1), False)):
        shape = [1, half.network.features, 2, 2]
        shape[axis] = length
        features = torch.zeros(shape, dtype=torch.float64)
        base = run(half.local, features.clone())
        features.select(axis, position).fill_(1e3)
        changed = (run(half.local, features) != base).any(1).any(4 - axis)[0]
        window = changed[core[0] * PX : core[1] * PX]
        assert bool(window.any()) is reaches, (axis, side, position)


def run(layers: torch.nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


@pytest.mark.slow
@pytest.mark.parametrize(("side", "limit_bytes"), [(1024, None), (1024, 1024**3), (2048, BESIDE_WEIGHTS)])
@pytest.mark.parametrize("task", ["decode", "encode"])
def test_live_bytes_are_within_the_plan_and_close_to_it(task: str, side: int, limit_bytes: int | None) -> None:
    """At full size, on meta tensors; beside the weights and the input, the result included; a few tiles tell."""
    vae = real()

    def seen(done: int, total: int) -> None:
        if done == ENOUGH_TILES:
            raise _Seen

    shape = (1, 64, side // PX, side // PX) if task == "decode" else (1, side, side, 4)
    source = torch.empty(shape, device="meta")
    result_bytes = 4 * side * side * 4 if task == "decode" else 64 * (side // PX) ** 2 * 4
    plan = getattr(vae, f"plan_{task}")(side, side, limit_bytes, result_bytes=result_bytes)
    with LiveBytes("meta") as live:
        source.view(shape)  # counted from here on
        with suppress(_Seen):
            getattr(vae, task)(source, limit_bytes=limit_bytes, out_device="meta", on_tile=seen)
    assert plan.is_whole is (limit_bytes is None or (task, side) == ("encode", 1024))
    assert 0.9 * plan.peak_bytes < live.peak - source.nbytes <= plan.peak_bytes


def test_2048_is_decoded_and_encoded_within_one_and_a_half_gigabytes() -> None:
    vae = real()
    weights = vae.footprint.weights_bytes
    limit = 1_500_000_000
    assert limit - weights >= BESIDE_WEIGHTS
    for plan in (vae.plan_decode, vae.plan_encode):
        tiles = plan(2048, 2048, limit - weights)
        assert tiles.peak_bytes + weights <= limit
        assert tiles.work < 4.1
    with pytest.raises(DoesNotFit):
        vae.plan_decode(2048, 2048, 10 * 1024**2)


def test_latents_without_frames_come_and_go(vae: ImageVAE21) -> None:
    latents = random(2, 64, 3, 4)
    assert torch.equal(vae.decode(latents), vae.decode(latents[:, :, None]))
    with pytest.raises(InvalidRequest, match="still images"):
        vae.decode(random(1, 64, 2, 3, 4))
    torch.testing.assert_close(normalised_latents(raw_latents(latents)), latents, rtol=1e-5, atol=1e-5)


def test_comfyuis_names_are_known(tmp_path: Path) -> None:
    weights = random_vae_21()
    names = [wan_name(name) for name in weights]
    assert len(set(names)) == len(weights)
    assert "decoder.upsamples.0.upsamples.0.residual.2.weight" in names
    assert "encoder.downsamples.0.downsamples.2.resample.1.weight" in names
    ours = ImageVAE21.read(open_checkpoint(write_file(tmp_path / "a.safetensors", weights)), torch.float32)
    theirs = ImageVAE21.from_state_dict(weights, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_each_vae_is_refused_in_the_place_of_the_other(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(make_vae().state_dict(), tmp_path / "old.safetensors")
    folder = write_folder(tmp_path / "vae", random_vae_21())
    with pytest.raises(WrongModel, match=r"old.safetensors is another model's VAE: it has 16 latent channels"):
        require_image_vae_21(open_checkpoint(tmp_path / "old.safetensors"))
    with pytest.raises(WrongModel, match=r"is Qwen-Image-2.1's VAE \(64 latent channels, RGBA\)"):
        require_image_vae(open_checkpoint(folder))
    with pytest.raises(WrongModel, match=r"is Qwen-Image-2.1's VAE \(64 latent channels, RGBA\)"):
        require_image_vae(open_checkpoint(write_file(tmp_path / "new.safetensors", random_vae_21())))


def test_a_file_that_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    weights = random_vae_21()
    del weights["decoder.up_blocks.2.resnets.1.conv2.bias"]
    with pytest.raises(DamagedFile, match=r"has no tensor decoder.up_blocks.2.resnets.1.conv2.bias"):
        require_image_vae_21(open_checkpoint(write_folder(tmp_path / "vae", weights)))


def test_operations_of_decoding_are_those_that_torch_counts(vae: ImageVAE21) -> None:
    generator = torch.Generator().manual_seed(7)
    with FlopCounterMode(display=False) as counter:
        vae.decode(torch.randn(1, vae.latent_channels, 12, 16, generator=generator))
    counted = vae.decode_flops(12 * vae.scale, 16 * vae.scale)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.15)  # borders of merged kernels are counted too
