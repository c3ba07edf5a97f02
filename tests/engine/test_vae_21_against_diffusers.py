"""Qwen-Image-2.1's VAE computes what diffusers' class does. Collected where diffusers has that class (0.42)."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage21
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.models.qwen_image_21_vae.image_vae import ImageVAE21
from qwenimage_lowvram.engine.models.qwen_image_21_vae.latent_statistics import LATENTS_MEAN, LATENTS_STD
from qwenimage_lowvram.engine.models.qwen_image_21_vae.shapes import image_vae_21_shapes
from small_vae_21 import random_vae_21, write_file, write_folder
from torch import Tensor


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_folder(tmp_path_factory.mktemp("vae") / "vae", random_vae_21())
    return AutoencoderKLQwenImage21.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def exact(theirs: Any) -> ImageVAE21:
    """In fp64, whose rounding the fp32 result cannot show."""
    return ImageVAE21.from_state_dict(theirs.state_dict(), dtype=torch.float64)


def random(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decoded(vae: Any, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return (vae.decode(latents[:, :, None]).sample[:, :, 0].permute(0, 2, 3, 1) + 1) / 2


def encoded(vae: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return vae.encode(images.permute(0, 3, 1, 2)[:, :, None] * 2 - 1).latent_dist.mode()[:, :, 0]


def test_a_decode_equals_diffusers(theirs: Any, exact: ImageVAE21) -> None:
    latents = random(2, 64, 5, 7)
    images = exact.decode(latents)
    expected = decoded(deepcopy(theirs).double(), latents.double())
    assert images.shape == (2, 80, 112, 4)
    assert expected.std() > 0.05
    torch.testing.assert_close(images, expected.float(), rtol=1e-6, atol=1e-6)


def test_an_encode_equals_diffusers(theirs: Any, exact: ImageVAE21) -> None:
    images = torch.rand((2, 96, 80, 4), generator=torch.Generator().manual_seed(3))
    latents = exact.encode(images)
    expected = encoded(deepcopy(theirs).double(), images.double())
    assert latents.shape == (2, 64, 6, 5)
    torch.testing.assert_close(latents, expected.float(), rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_errs_no_more_than_diffusers_in_its_dtype(theirs: Any, exact: ImageVAE21, dtype: torch.dtype) -> None:
    latents = random(2, 64, 6, 6)
    ours = ImageVAE21.from_state_dict(theirs.state_dict(), dtype=dtype).decode(latents)
    whole = exact.decode(latents)
    other = decoded(deepcopy(theirs).to(dtype), latents.to(dtype)).float()
    assert 0 < (ours - whole).square().mean() <= 1.1 * (other - whole).square().mean()


def test_the_shapes_and_statistics_are_diffusers_own(theirs: Any) -> None:
    with torch.device("meta"):
        real = AutoencoderKLQwenImage21()
    shapes = {name: tuple(weight.shape) for name, weight in real.state_dict().items() if ".time_conv." not in name}
    assert {n: s for n, s in shapes.items() if not n.endswith(".gamma")} == {
        n: s for n, s in image_vae_21_shapes(96, 144).items() if not n.endswith(".gamma")
    }
    assert shapes.keys() == image_vae_21_shapes(96, 144).keys()
    assert (tuple(real.config.latents_mean), tuple(real.config.latents_std)) == (LATENTS_MEAN, LATENTS_STD)


def test_a_folder_and_comfyuis_file_are_the_same_vae(theirs: Any, tmp_path: Path) -> None:
    weights = random_vae_21()
    folder, file = write_folder(tmp_path / "vae", weights), write_file(tmp_path / "vae.safetensors", weights)
    images = torch.rand((1, 64, 96, 4), generator=torch.Generator().manual_seed(5))
    latents = [ImageVAE21.read(open_checkpoint(path), torch.float32).encode(images) for path in (folder, file)]
    assert torch.equal(*latents)
    assert (latents[0] - encoded(theirs, images)).abs().max() < 1e-5 * latents[0].abs().max()
