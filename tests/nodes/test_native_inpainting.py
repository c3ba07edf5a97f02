"""Image to image, inpainting and outpainting: our MODEL, VAE and Sample make what ComfyUI's own classes make."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import InvalidRequest
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant
from safetensors.torch import load_file
from split_files import wan_vae_name

from .conftest import cond
from .test_model import ksampler
from .test_native_editing import native_model

WIDTH, HEIGHT = 96, 64
IMAGES = torch.rand(2, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def native(full_pipeline: Path, comfy: Any) -> Any:
    """ComfyUI's own model and vae."""
    import comfy.sd

    weights = load_file(full_pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    vae = comfy.sd.VAE(sd={wan_vae_name(name): value for name, value in weights.items()}, dtype=torch.float32)
    return SimpleNamespace(model=native_model(full_pipeline, Variant.QWEN_IMAGE), vae=vae, batches=False)


@pytest.fixture(scope="module")
def ours(full_pipeline: Path, comfy: Any) -> Any:
    from qwenimage_lowvram.nodes.adapters.model import make_model
    from qwenimage_lowvram.nodes.adapters.vae import make_vae

    transformer = QwenImageTransformer(
        open_checkpoint(full_pipeline / "transformer"),
        dtype=torch.float32,
        hardware=Hardware.detect(torch.device("cpu")),
    )
    vae = make_vae(open_checkpoint(full_pipeline / "vae"), dtype=torch.float32, limit_bytes=None)
    return SimpleNamespace(model=make_model(transformer, None), vae=vae, batches=True)


def sample(model: Any, positive: Any, negative: Any, latent: Any, **options: Any) -> torch.Tensor:
    """The samples of our own sampler node."""
    from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

    settings = {"seed": 42, "steps": 4, "cfg": 3.0, "sampler": "euler", "scheduler": "qwen_image"}
    settings |= {"denoise": 1.0, "norm_rescale": True} | options
    out = QwenLowVRAMSample().sample(model, positive, negative, latent, **settings)
    result: torch.Tensor = out["result"][0]["samples"]
    return result


def box(width: int = WIDTH, height: int = HEIGHT) -> torch.Tensor:
    """A mask over the middle of the right half, (1, H, W)."""
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : height * 3 // 4, width // 2 : width * 7 // 8] = 1
    return mask


def slope(width: int = WIDTH, height: int = HEIGHT) -> torch.Tensor:
    return torch.linspace(0, 1, width).expand(1, height, width).contiguous()


# each makes (model, positive, negative, latent) with ComfyUI's own nodes
Prepared = tuple[Any, Any, Any, dict[str, Any]]


def encoded(way: Any, pixels: torch.Tensor = IMAGES[:1]) -> dict[str, Any]:
    import nodes

    # ComfyUI's own VAE takes several images for a video
    shown = pixels.split(len(pixels) if way.batches else 1)
    return {"samples": torch.cat([nodes.VAEEncode().encode(way.vae, each)[0]["samples"] for each in shown])}


def masked(way: Any, mask: torch.Tensor, pixels: torch.Tensor = IMAGES[:1]) -> Prepared:
    import nodes

    latent = nodes.SetLatentNoiseMask().set_mask(encoded(way, pixels), mask)[0]
    return way.model, cond(), cond(5, 2), latent


def plain(way: Any) -> Prepared:
    return way.model, cond(), cond(5, 2), encoded(way)


def images(way: Any) -> Prepared:
    return way.model, cond(), cond(5, 2), encoded(way, IMAGES)


def repeated(way: Any) -> Prepared:
    import nodes

    model, positive, negative, latent = masked(way, box())
    return model, positive, negative, nodes.RepeatLatentBatch().repeat(latent, 2)[0]


def erased(way: Any) -> Prepared:
    import nodes

    return way.model, cond(), cond(5, 2), nodes.VAEEncodeForInpaint().encode(way.vae, IMAGES[:1], box())[0]


def conditioned(way: Any) -> Prepared:
    import nodes

    args = (cond(), cond(5, 2), IMAGES[:1], way.vae, box())
    return way.model, *nodes.InpaintModelConditioning().encode(*args)


def graded(way: Any) -> Prepared:
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    model, *rest = masked(way, slope())
    return DifferentialDiffusion.execute(model)[0], *rest


def outpainted(way: Any) -> Prepared:
    import nodes

    padded, mask = nodes.ImagePadForOutpaint().expand_image(IMAGES[:1], 16, 0, 16, 32, 8)
    return masked(way, mask, padded)


def grown(way: Any) -> Prepared:
    from comfy_extras.nodes_mask import GrowMask

    return masked(way, GrowMask.execute(box(), 8, True)[0])


def feathered(way: Any) -> Prepared:
    from comfy_extras.nodes_mask import FeatherMask, SolidMask

    return masked(way, FeatherMask.execute(SolidMask.execute(1.0, WIDTH, HEIGHT)[0], 16, 16, 16, 16)[0])


def misfitting(way: Any) -> Prepared:
    return masked(way, box(50, 90))


CASES = {
    "image to image": plain,
    "two images": images,
    "a mask": lambda way: masked(way, box()),
    "one mask for two images": lambda way: masked(way, box(), IMAGES),
    "a repeated latent with a mask": repeated,
    "VAEEncodeForInpaint": erased,
    "InpaintModelConditioning": conditioned,
    "DifferentialDiffusion": graded,
    "a soft mask": lambda way: masked(way, slope()),
    "ImagePadForOutpaint": outpainted,
    "GrowMask": grown,
    "FeatherMask": feathered,
    "a mask of another size and shape": misfitting,
}


@pytest.mark.parametrize("denoise", [1.0, 0.6])
@pytest.mark.parametrize("sampler", [ksampler, sample], ids=["KSampler", "Sample"])
@pytest.mark.parametrize("case", CASES)
def test_our_models_make_the_latents_of_comfyuis(
    case: str, sampler: Callable[..., torch.Tensor], denoise: float, ours: Any, native: Any
) -> None:
    made, wanted = (sampler(*CASES[case](way), denoise=denoise) for way in (ours, native))
    assert made.shape == wanted.shape
    assert (made - wanted).abs().max() < 1e-4
    assert wanted.std() > 0.1


def test_each_image_of_a_batch_has_its_own_mask(ours: Any, native: Any) -> None:
    masks = torch.cat([box(), box().flip(2)])
    made = sample(*masked(ours, masks, IMAGES))
    for i in range(2):
        # ComfyUI mixes masks of a batch, so one at a time
        alone = sample(*masked(native, masks[i : i + 1], IMAGES))
        assert (made[i] - alone[i]).abs().max() < 1e-4
    assert (made[0] - sample(*masked(ours, masks[1:], IMAGES))[0]).abs().max() > 0.1


def test_what_the_mask_leaves_out_stays(ours: Any) -> None:
    model, positive, negative, latent = masked(ours, box())
    for sampler in (ksampler, sample):
        change = (sampler(model, positive, negative, latent) - latent["samples"]).abs()[0, :, 0]
        inside = box()[0, ::8, ::8].bool()
        assert change[:, ~inside].max() < 1e-5
        assert change[:, inside].mean() > 0.1


# bad input


@pytest.mark.parametrize("mask", [torch.zeros(1, 64, 64), torch.zeros(1, 1, HEIGHT, WIDTH)], ids=["LoadImage", "4D"])
def test_an_empty_mask_is_refused_before_the_run(mask: torch.Tensor, ours: Any) -> None:
    ours.model.model.last_report = None
    with pytest.raises(InvalidRequest, match=r"noise mask is empty(.|\n)*Mask Editor"):
        sample(*masked(ours, mask))
    assert ours.model.model.last_report is None


def test_more_masks_than_images_are_refused(ours: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"2 masks for a batch of 1(.|\n)*MaskComposite"):
        sample(*masked(ours, torch.cat([box(), box()])))


def test_an_image_of_any_size_is_wrapped_round_as_comfyuis_own_model_does_it(
    ours: Any, native: Any, caplog: pytest.LogCaptureFixture
) -> None:
    odd = torch.rand(1, 90, 156, 3)  # 11x19 latents, of 6x10 patches
    with caplog.at_level(logging.WARNING):
        made = ksampler(*masked(ours, box(), odd))
    assert "An image of 152x88 px is not a multiple of 16" in caplog.text
    assert "pad it to 160x96" in caplog.text
    wanted = ksampler(*masked(native, box(), odd))
    assert made.shape == wanted.shape == (1, 16, 1, 11, 19)
    assert (made - wanted).abs().max() < 1e-4
    assert sample(*masked(ours, box(), odd)).isfinite().all()


def test_denoise_0_gives_the_image_back_and_runs_nothing(ours: Any) -> None:
    model, positive, negative, latent = masked(ours, box())
    model.model.last_report = None
    assert torch.equal(ksampler(model, positive, negative, latent, denoise=0.0), latent["samples"])
    assert model.model.last_report is None
