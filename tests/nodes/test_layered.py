"""Qwen-Image-Layered under ComfyUI's own samplers: the layers of ComfyUI's own model, counted in the plan."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import InvalidRequest, Unsupported
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.positions import Positions
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant
from safetensors.torch import load_file

from .conftest import cond, empty_latent
from .test_model import ksampler, one_by_one, references

CPU = torch.device("cpu")


@pytest.fixture
def transformer(layered_pipeline: Path) -> QwenImageTransformer:
    checkpoint = open_checkpoint(layered_pipeline / "transformer")
    return QwenImageTransformer(
        checkpoint, dtype=torch.float32, hardware=Hardware.detect(CPU), positions=Positions.COMFYUI
    )


@pytest.fixture(scope="module")
def native(layered_pipeline: Path, comfy: Any) -> Any:
    """ComfyUI's own MODEL at the small size, as its loader sets it up for Layered."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    given = json.loads((layered_pipeline / "transformer" / "config.json").read_text(encoding="utf-8"))
    names = ("num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope")
    settings = {
        "image_model": "qwen_image", "in_channels": 64, "use_additional_t_cond": True,
        "default_ref_method": "negative_index", **{name: given[name] for name in names},
    }  # fmt: skip
    config = comfy.supported_models.QwenImage(settings)
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.QwenImage(config, device=CPU)
    model.diffusion_model.load_state_dict(
        load_file(layered_pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    )
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def layers(count: int, width: int = 160, height: int = 96, batch: int = 1) -> dict[str, torch.Tensor]:
    """As EmptyQwenImageLayeredLatentImage makes them."""
    return {"samples": torch.zeros(batch, 16, count + 1, height // 8, width // 8)}


def shown(size: tuple[int, int] = (12, 20)) -> tuple[Any, Any]:
    image = references(size)
    return cond(9, reference_latents=image), cond(5, 2, reference_latents=image)


@pytest.mark.parametrize("size", [(14, 22), (6, 10), (12, 6)], ids=str)
@pytest.mark.parametrize("reference", [(14, 22), (18, 10)], ids=str)
def test_layers_of_any_count_of_patches_are_those_of_comfyuis_own_model(
    size: tuple[int, int], reference: tuple[int, int], model: Any, native: Any
) -> None:
    # 7x11, 3x5 and 6x3 patches: odd, and fewer in half a side than there are layers
    latent = layers(4, width=size[1] * 8, height=size[0] * 8)
    made, wanted = (ksampler(m, *shown(reference), latent) for m in (model, native))
    assert wanted.std() > 0.5
    assert (made - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(("count", "batch", "image"), [(4, 1, True), (1, 1, True), (2, 2, True), (3, 1, False)])
def test_layers_are_those_of_comfyuis_own_model(count: int, batch: int, image: bool, model: Any, native: Any) -> None:
    positive, negative = shown() if image else (cond(), cond(5, 2))
    made, wanted = (ksampler(m, positive, negative, layers(count, batch=batch)) for m in (model, native))
    assert made.shape == wanted.shape == (batch, 16, count + 1, 12, 20)
    assert wanted.std() > 0.5
    assert (made - wanted).abs().max() < 1e-4


def test_layers_of_any_images_size_are_wrapped_round_as_comfyuis_own_model_does_it(
    model: Any, native: Any, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"samples": torch.zeros(1, 16, 3, 11, 19)}  # of 6x10 patches
    with caplog.at_level(logging.WARNING):
        made = ksampler(model, *shown((11, 19)), odd)
    assert "An image of 152x88 px is not a multiple of 16" in caplog.text
    wanted = ksampler(native, *shown((11, 19)), odd)
    assert made.shape == wanted.shape == (1, 16, 3, 11, 19)
    assert (made - wanted).abs().max() < 1e-4
    assert model.model.last_report.plan.request.frame_tokens == 60


def test_our_sampler_takes_layers_of_any_images_size(model: Any) -> None:
    from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

    odd = {"samples": torch.zeros(1, 16, 3, 11, 19)}
    out = QwenLowVRAMSample().sample(model, *shown((11, 19)), odd, 1, 2, 4.0, "euler", "qwen_image", 1.0, True)
    samples = out["result"][0]["samples"]
    assert samples.shape == (1, 16, 3, 11, 19)
    assert torch.isfinite(samples).all()


def test_the_image_changes_every_layer(model: Any) -> None:
    one, other = (ksampler(model, *shown(size), layers(2)) for size in ((12, 20), (12, 16)))
    assert ((one - other).abs().mean(dim=(0, 1, 3, 4)) > 1e-3).all()


def test_layers_together_equal_layers_one_prompt_after_another(model: Any) -> None:
    assert torch.equal(ksampler(model, *shown(), layers(3)), ksampler(one_by_one(model), *shown(), layers(3)))


def test_the_plan_counts_every_layer_and_the_image(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ksampler(model, *shown(), layers(3, batch=2))
    request = model.model.last_report.plan.request
    assert (request.frames, request.reference_tokens, request.branches) == (4, 60, 4)
    assert request.image_tokens == 5 * 60
    assert str(request) == "160x96, 4 frames, 4 branches"
    assert "is given an image to edit" not in caplog.text


def test_an_additional_condition_of_a_call_is_used(model: Any) -> None:
    def conditioned(index: int) -> torch.Tensor:
        clone = model.clone()
        condition = torch.tensor([index])
        clone.set_model_unet_function_wrapper(
            lambda apply, args: apply(args["input"], args["timestep"], additional_t_cond=condition, **args["c"])
        )
        return ksampler(clone, *shown(), layers(2))

    plain = ksampler(model, *shown(), layers(2))
    assert torch.equal(conditioned(0), plain)
    assert (conditioned(1) - plain).abs().mean() > 1e-3
    with pytest.raises(Unsupported, match=r"additional time condition of \[2\]"):
        conditioned(2)


# what is refused, before anything is loaded


def refused(model: Any, positive: Any, negative: Any, latent: Any) -> str:
    with pytest.raises(InvalidRequest, match="What to do") as caught:
        ksampler(model, positive, negative, latent)
    assert model.model.transformer.store.fetched_blocks == 0
    return str(caught.value)


def test_a_layered_model_in_a_graph_for_whole_images_is_refused(model: Any) -> None:
    said = refused(model, cond(), cond(5, 2), empty_latent())
    assert said.startswith("Qwen-Image-Layered makes layers, but this graph's latent has none.")
    assert "EmptyQwenImageLayeredLatentImage" in said


@pytest.mark.parametrize("variant", [Variant.QWEN_IMAGE, Variant.EDIT_2511], ids=lambda variant: variant.value)
def test_layers_for_another_model_are_refused(variant: Variant, make_transformer: Callable[..., Any]) -> None:
    from qwenimage_lowvram.nodes.adapters.model import make_model

    said = refused(make_model(make_transformer(variant=variant), None), *shown(), layers(2))
    assert said.startswith(f"The latent has 3 frames, but {variant.value} makes a single image.")
    assert "choose a Qwen-Image-Layered file in 'Load Qwen-Image (low VRAM)'" in said


def test_two_images_and_layers_as_an_image_are_refused(model: Any) -> None:
    two = cond(reference_latents=references((12, 20), (12, 16)))
    assert "takes one image apart, but a prompt in this graph gives it 2" in refused(model, two, two, layers(2))
    several = cond(reference_latents=[torch.zeros(1, 16, 3, 12, 20)])
    assert "A reference latent has 3 frames" in refused(model, several, several, layers(2))


def test_a_condition_that_the_model_does_not_have_is_refused(make_transformer: Callable[..., Any]) -> None:
    from qwenimage_lowvram.nodes.adapters.model import make_model

    clone = make_model(make_transformer(), None).clone()
    clone.set_model_unet_function_wrapper(
        lambda apply, args: apply(args["input"], args["timestep"], additional_t_cond=torch.tensor([0]), **args["c"])
    )
    with pytest.raises(Unsupported, match="Additional time conditioning"):
        ksampler(clone, cond(), cond(5, 2), empty_latent())
