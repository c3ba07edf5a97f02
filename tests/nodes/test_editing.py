"""An editing model is shown an image, or says before the run that it is shown none."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import InvalidRequest
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant

from .conftest import cond, empty_latent
from .test_model import ksampler, references

EDITING = [variant for variant in Variant if variant.edits]
by_name = pytest.mark.parametrize("variant", EDITING, ids=lambda variant: variant.value)


@pytest.fixture
def make_model(make_transformer: Callable[..., Any]) -> Callable[[Variant], Any]:
    def make(variant: Variant) -> Any:
        from qwenimage_lowvram.nodes.adapters.model import make_model

        return make_model(make_transformer(variant=variant), None)

    return make


@by_name
def test_an_edit_model_in_a_text_to_image_graph_is_refused_before_anything_is_loaded(
    variant: Variant, make_model: Callable[[Variant], Any]
) -> None:
    model = make_model(variant)
    with pytest.raises(InvalidRequest) as caught:
        ksampler(model, cond(), cond(5, 2), empty_latent())
    assert str(caught.value).startswith(f"{variant.value} edits images, but this graph gives it none")
    assert "set variant to Qwen-Image in 'Load Qwen-Image (low VRAM)'" in str(caught.value)
    assert model.model.transformer.store.fetched_blocks == 0


@by_name
@pytest.mark.parametrize("place", ["positive", "negative"])
def test_an_edit_model_that_is_shown_an_image_samples(
    variant: Variant, place: str, make_model: Callable[[Variant], Any], caplog: pytest.LogCaptureFixture
) -> None:
    shown, plain = cond(reference_latents=references((6, 8))), cond(5, 2)
    positive, negative = (shown, plain) if place == "positive" else (plain, shown)
    with caplog.at_level(logging.WARNING):
        assert torch.isfinite(ksampler(make_model(variant), positive, negative, empty_latent())).all()
    assert "is given an image to edit" not in caplog.text


def test_an_edit_model_without_an_image_samples_where_a_condition_says_that_this_is_meant(
    make_model: Callable[[Variant], Any],
) -> None:
    from qwenimage_lowvram.nodes.adapters.graph_checks import NO_IMAGES_KEY

    meant = cond(**{NO_IMAGES_KEY: True})
    edited = ksampler(make_model(Variant.EDIT_2509), meant, cond(5, 2), empty_latent())
    assert torch.equal(edited, ksampler(make_model(Variant.QWEN_IMAGE), cond(), cond(5, 2), empty_latent()))


def test_a_text_to_image_model_that_is_shown_an_image_samples_with_a_warning(
    make_model: Callable[[Variant], Any], caplog: pytest.LogCaptureFixture
) -> None:
    shown = cond(reference_latents=references((6, 8)))
    with caplog.at_level(logging.WARNING):
        assert torch.isfinite(ksampler(make_model(Variant.QWEN_IMAGE), shown, cond(5, 2), empty_latent())).all()
    assert "Qwen-Image is given an image to edit, which it was not trained for;" in caplog.text


def test_a_reference_without_frames_is_refused_before_anything_is_loaded(make_model: Callable[[Variant], Any]) -> None:
    model = make_model(Variant.EDIT_2509)
    with pytest.raises(InvalidRequest, match=r"A reference latent has the shape \[.*five dimensions(.|\n)*VAE Encode"):
        ksampler(model, cond(reference_latents=[torch.zeros(1, 16, 6, 8)]), cond(5, 2), empty_latent())
    assert model.model.last_report is None
