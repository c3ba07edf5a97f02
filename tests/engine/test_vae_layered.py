"""Qwen-Image-Layered's VAE: images with alpha, and latents of several layers, as diffusers and ComfyUI have them."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import full_size
import pytest
import torch
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.errors import InvalidRequest, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.models.qwen_image_vae.image_vae import ImageVAE
from qwenimage_lowvram.engine.models.qwen_image_vae.tensor_names import RGB, RGBA, require_image_vae
from safetensors.torch import save_file
from small_checkpoint import make_vae
from split_files import wan_vae_name

from .test_vae import make_lively_vae, random_images, random_latents, reference_decode, reference_encode

FRAMES = 4


@pytest.fixture(scope="module")
def theirs() -> Any:
    return make_lively_vae(channels=4).double()


@pytest.fixture(scope="module")
def exact(theirs: Any) -> ImageVAE:
    return ImageVAE.from_state_dict(theirs.state_dict(), dtype=torch.float64)


def write_vae(folder: Path, channels: int) -> Path:
    path = folder / f"vae{channels}.safetensors"
    weights = make_vae(channels=channels).state_dict()
    save_file({wan_vae_name(name): tensor for name, tensor in weights.items()}, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae"), 4)


@pytest.mark.slow
@pytest.mark.parametrize("tile_px", [0, 64])
def test_each_layer_decodes_as_diffusers_decodes_it_alone(theirs: Any, exact: ImageVAE, tile_px: int) -> None:
    latents = random_latents(2, 16, FRAMES, 23, 30).double()
    images = exact.decode(latents, tile_px=tile_px)
    # QwenImageLayeredPipeline: one layer after another, of one image after another
    alone = latents.permute(0, 2, 1, 3, 4).reshape(-1, 16, 1, 23, 30)
    expected = reference_decode(theirs, alone)
    assert images.shape == (2 * FRAMES, 184, 240, 4)
    assert expected[..., 3].std() > 0.05
    torch.testing.assert_close(images, expected.clamp(0, 1), rtol=1e-7, atol=1e-7)


def test_layers_are_decoded_in_the_memory_of_one(exact: ImageVAE) -> None:
    plans: list[Any] = []
    latents = random_latents(1, 16, FRAMES, 12, 16)
    ticks: list[tuple[int, int]] = []
    exact.decode(latents, on_plan=plans.append, on_tile=lambda *tick: ticks.append(tick), out_device="meta")
    assert [plan.peak_bytes for plan in plans] == [exact.plan_decode(96, 128).peak_bytes]
    assert ticks == [(i + 1, FRAMES) for i in range(FRAMES)]


def test_an_image_with_alpha_encodes_as_diffusers_encodes_it(theirs: Any, exact: ImageVAE) -> None:
    images = random_images(2, 96, 136, 4).double()
    latents = exact.encode(images)
    assert latents.shape == (2, 16, 1, 12, 17)
    torch.testing.assert_close(latents, reference_encode(theirs, images).float(), rtol=2e-7, atol=2e-7)
    torch.testing.assert_close(exact.encode(images, tile_px=64), latents, rtol=2e-7, atol=2e-7)


def test_alpha_counts(exact: ImageVAE) -> None:
    opaque, clear = random_images(1, 64, 64, 4), random_images(1, 64, 64, 4)
    opaque[..., 3], clear[..., 3] = 1.0, 0.0
    assert (exact.encode(opaque) - exact.encode(clear)).abs().max() > 0.01


def test_native_nodes_give_what_they_give_with_the_native_vae(comfy: ModuleType, file: Path) -> None:
    import comfy.sd
    import comfy.utils

    importlib.import_module("comfy_extras.nodes_post_processing")  # first: it and the next import each other
    from comfy_extras.nodes_latent import LatentCutToBatch
    from qwenimage_lowvram.nodes.adapters.vae import make_vae

    import nodes

    native = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)), dtype=torch.float32)
    ours = make_vae(open_checkpoint(file), dtype=torch.float32, limit_bytes=None)
    with torch.inference_mode():
        latents = {"samples": random_latents(1, 16, FRAMES, 12, 16)}
        cut = LatentCutToBatch.execute(latents, "t", 1)[0]
        (images,), (expected,) = (nodes.VAEDecode().decode(vae, cut) for vae in (ours, native))
        assert images.shape == expected.shape == (FRAMES, 96, 128, 4)
        assert (images - expected).abs().max() < 3e-6
        assert torch.equal(ours.decode(latents["samples"]), images)
        for channels in (3, 4):  # without alpha, an image is opaque
            pixels = random_images(1, 96, 128, channels)
            (made,), (wanted,) = (nodes.VAEEncode().encode(vae, pixels) for vae in (ours, native))
            assert (made["samples"] - wanted["samples"]).abs().max() < 1e-6 * wanted["samples"].abs().max() + 2e-6


def test_frames_of_another_vae_are_no_layers() -> None:
    vae = ImageVAE.from_state_dict(make_vae().state_dict(), dtype=torch.float32)
    with pytest.raises(InvalidRequest, match="still images"):
        vae.decode(random_latents(1, 16, 3, 8, 8))


@pytest.mark.slow
def test_layers_at_full_size_take_the_memory_of_one_image_as_planned() -> None:
    vae, plain = (
        ImageVAE.without_weights(full_size.vae_checkpoint(channels=n), dtype=torch.bfloat16) for n in (RGBA, RGB)
    )
    assert (vae.footprint.pixel_bytes, plain.footprint.pixel_bytes) == (16, 12)
    result_bytes = FRAMES * 640 * 640 * 16
    planned = vae.plan_decode(640, 640, result_bytes=result_bytes).peak_bytes
    assert planned - result_bytes == pytest.approx(plain.plan_decode(640, 640).peak_bytes, rel=0.02)
    source = torch.empty(1, 16, FRAMES, 80, 80, device="meta")
    with LiveBytes("meta") as live:
        vae.decode(source, out_device="meta")
    assert 0.9 * planned < live.peak < 1.1 * planned


@pytest.mark.parametrize(("has", "needed"), [(RGBA, RGB), (RGB, RGBA)])
def test_the_vae_of_the_other_kind_is_refused_with_the_right_ones_name(has: int, needed: int, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_vae(tmp_path, has))
    require_image_vae(checkpoint)
    require_image_vae(checkpoint, channels=has)
    name = {RGB: "qwen_image_vae", RGBA: "qwen_image_layered_vae"}[needed]
    with pytest.raises(WrongModel, match=rf"vae{has}\.safetensors is the VAE .* Use {name}\.safetensors"):
        require_image_vae(checkpoint, channels=needed)
