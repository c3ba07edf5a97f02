"""The VAE as ComfyUI's VAE: native nodes work with it, and give what they give with the native one."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import DoesNotFit, InvalidRequest, Unsupported
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from safetensors.torch import save_file
from small_checkpoint import make_vae
from split_files import wan_vae_name


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "qwen_image_vae.safetensors"
    save_file({wan_vae_name(name): tensor for name, tensor in make_vae().state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def native(comfy: ModuleType, file: Path) -> Any:
    import comfy.sd
    import comfy.utils

    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)), dtype=torch.float32)


@pytest.fixture(scope="module")
def ours(comfy: ModuleType, file: Path) -> Any:
    from qwenimage_lowvram.nodes.adapters.vae import make_vae

    return make_vae(open_checkpoint(file), dtype=torch.float32, limit_bytes=None)


@pytest.fixture
def nodes(comfy: ModuleType) -> ModuleType:
    import nodes

    return nodes


@pytest.fixture(autouse=True)
def _as_in_a_node() -> Any:
    with torch.inference_mode():
        yield


LATENTS = torch.randn(2, 16, 1, 12, 17, generator=torch.Generator().manual_seed(1))
IMAGES = torch.rand(2, 100, 139, 4, generator=torch.Generator().manual_seed(2))


def test_native_decode_gives_the_native_image(nodes: ModuleType, ours: Any, native: Any) -> None:
    (images,) = nodes.VAEDecode().decode(ours, {"samples": LATENTS})
    (expected,) = nodes.VAEDecode().decode(native, {"samples": LATENTS})
    assert images.shape == expected.shape == (2, 96, 136, 3)
    assert images.dtype == expected.dtype
    assert (images - expected).abs().max() < 3e-6


@pytest.mark.parametrize("tile", [64, 512])
def test_native_tiled_decode_is_exact(nodes: ModuleType, ours: Any, tile: int) -> None:
    (images,) = nodes.VAEDecodeTiled().decode(ours, {"samples": LATENTS}, tile)
    assert (images - ours.decode(LATENTS)).abs().max() < 1e-6


def test_native_encode_gives_each_image_its_latent(nodes: ModuleType, ours: Any, native: Any) -> None:
    samples = nodes.VAEEncode().encode(ours, IMAGES)[0]["samples"]
    # the native VAE takes a batch for a video, so it gets one image at a time
    expected = torch.cat([nodes.VAEEncode().encode(native, image[None])[0]["samples"] for image in IMAGES])
    assert samples.shape == (2, 16, 1, 12, 17)
    assert (samples - expected).abs().max() < 1e-5
    tiled = nodes.VAEEncodeTiled().encode(ours, IMAGES, 64, 0)[0]["samples"]
    assert (tiled - samples).abs().max() < 1e-5


def test_inpainting_encodes_and_masks(nodes: ModuleType, ours: Any, native: Any) -> None:
    mask = torch.zeros(1, 100, 139)
    mask[:, 20:60, 30:90] = 1
    latent = nodes.VAEEncodeForInpaint().encode(ours, IMAGES[:1, ..., :3], mask)[0]
    expected = nodes.VAEEncodeForInpaint().encode(native, IMAGES[:1, ..., :3], mask)[0]
    assert (latent["samples"] - expected["samples"]).abs().max() < 1e-5
    assert torch.equal(latent["noise_mask"], expected["noise_mask"])
    masked = nodes.SetLatentNoiseMask().set_mask({"samples": latent["samples"]}, mask)[0]
    assert masked["noise_mask"].shape == (1, 1, 100, 139)


class _Clip:
    """The part of a CLIP that the edit nodes call."""

    def tokenize(self, text: str, **options: Any) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list[Any]:
        return [[torch.zeros(1, 4, 8), {}]]


def test_edit_nodes_get_reference_latents(comfy: ModuleType, ours: Any) -> None:
    from comfy_extras.nodes_qwen import TextEncodeQwenImageEdit

    image = torch.full((1, 48, 48, 3), 0.25)  # the node scales it to 1024x1024
    conditioning = TextEncodeQwenImageEdit.execute(_Clip(), "a hat", vae=ours, image=image)[0]
    (latent,) = conditioning[0][1]["reference_latents"]
    assert latent.shape == (1, 16, 1, 128, 128)
    assert (latent - ours.encode(torch.full((1, 1024, 1024, 3), 0.25))).abs().max() < 1e-5


@pytest.mark.parametrize("tile_size", [0, 64])
@pytest.mark.parametrize("kind", ["ours", "native"])
def test_the_decode_node_takes_any_vae(
    comfy: ModuleType, request: pytest.FixtureRequest, kind: str, tile_size: int
) -> None:
    from qwenimage_lowvram.nodes.decode import QwenLowVRAMDecode

    vae = request.getfixturevalue(kind)
    images, mask = QwenLowVRAMDecode().decode({"samples": LATENTS}, vae, tile_size)
    assert images.shape == (2, 96, 136, 3)
    assert torch.equal(mask, torch.zeros(2, 96, 136))
    if kind == "ours" or tile_size == 0:
        assert (images - vae.decode(LATENTS).reshape(images.shape)).abs().max() < 1e-6


def test_every_input_of_the_decode_node_has_a_tooltip(comfy: ModuleType) -> None:
    from qwenimage_lowvram.nodes.decode import QwenLowVRAMDecode

    inputs = QwenLowVRAMDecode.INPUT_TYPES()["required"]
    assert set(inputs) == {"samples", "vae", "tile_size"}
    assert all(options["tooltip"] for _, options in inputs.values())


def test_tiles_are_the_progress(comfy: ModuleType, ours: Any) -> None:
    import comfy.utils

    seen: list[tuple[int, int]] = []
    comfy.utils.set_progress_bar_global_hook(lambda done, total, preview, node_id=None: seen.append((done, total)))
    try:
        ours.decode_tiled(torch.zeros(2, 16, 1, 8, 30), tile_x=1, tile_y=1)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    total = 2 * len(ours.first_stage_model.plan_decode(64, 240, tile_px=8))
    assert total > 2
    assert seen[-1] == (total, total)


def test_an_interruption_ends_the_decode_after_a_tile(comfy: ModuleType, ours: Any) -> None:
    import comfy.model_management as management

    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        ours.decode(LATENTS)
    management.interrupt_current_processing(False)
    assert ours.decode(LATENTS).shape == (2, 96, 136, 3)


def test_a_limit_holds_weights_and_tiles(comfy: ModuleType, ours: Any, file: Path) -> None:
    from qwenimage_lowvram.nodes.adapters.vae import LowVRAMVAE

    latents = torch.randn(1, 16, 1, 64, 64)
    weights = ours.size
    whole = ours.first_stage_model.plan_decode(512, 512, result_bytes=12 * 512 * 512).peak_bytes
    totals: list[int] = []
    limited = LowVRAMVAE(ours.first_stage_model, limit_bytes=weights + whole // 2)
    import comfy.utils

    comfy.utils.set_progress_bar_global_hook(lambda done, total, preview, node_id=None: totals.append(total))
    try:
        images = limited.decode(latents)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert totals[-1] > 1
    assert (images - ours.decode(latents)).abs().max() < 1e-6
    limited.limit_bytes = weights + 10**6
    with pytest.raises(DoesNotFit, match="decode of 512x512"):
        limited.decode(latents)


def test_estimates_are_the_plans(ours: Any) -> None:
    whole = ours.first_stage_model.plan_decode(96, 136).peak_bytes
    assert ours.memory_used_decode(LATENTS.shape, ours.vae_dtype) == whole
    assert ours.memory_used_encode((1, 3, 100, 139), ours.vae_dtype) == (
        ours.first_stage_model.plan_encode(96, 136).peak_bytes
    )


def test_the_vae_has_what_nodes_ask_of_one(ours: Any) -> None:
    assert ours.spacial_compression_decode() == ours.spacial_compression_encode() == 8
    assert ours.temporal_compression_decode() is None
    assert (ours.latent_channels, ours.latent_dim) == (16, 3)
    assert not ours.is_dynamic()
    ours.throw_exception_if_invalid()


def test_saving_the_folded_vae_is_refused(ours: Any) -> None:
    with pytest.raises(Unsupported, match="VAESave"):
        ours.get_sd()


def test_an_image_smaller_than_a_latent_is_refused(ours: Any) -> None:
    with pytest.raises(InvalidRequest, match="8x8"):
        ours.encode(torch.zeros(1, 7, 64, 3))
