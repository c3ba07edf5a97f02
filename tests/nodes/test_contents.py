"""What other nodes hand over that is no latent, image, conditioning, mask or schedule: refused in our words."""

import math
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import InvalidRequest, QwenLowVRAMError

from .conftest import DIM, EDIT, cond, decode, embeds, empty_latent, sample
from .test_model import ksampler

NAN, INFINITY = math.nan, math.inf

# what other nodes hand over

NO_LATENTS = {
    "nothing": None,
    "a text": "samples",
    "an empty dict": {},
    "no samples": {"noise_mask": torch.ones(1, 8, 8)},
    "samples of None": {"samples": None},
    "samples as a list": {"samples": [[0.0]]},
    "an empty batch": {"samples": torch.zeros(0, 16, 1, 8, 12)},
    "no pixels": {"samples": torch.zeros(1, 16, 1, 0, 12)},
    "NaN": {"samples": torch.full((1, 16, 1, 8, 12), NAN)},
    "one infinity": {"samples": torch.zeros(1, 16, 1, 8, 12).index_fill(4, torch.tensor([3]), INFINITY)},
    "whole numbers": {"samples": torch.zeros(1, 16, 1, 8, 12, dtype=torch.int64)},
    "complex numbers": {"samples": torch.zeros(1, 16, 1, 8, 12, dtype=torch.complex64)},
    "fp8": {"samples": torch.zeros(1, 16, 1, 8, 12, dtype=torch.float8_e4m3fn)},
    "numbers elsewhere": {"samples": torch.zeros(1, 16, 1, 8, 12, device="meta")},
    "sparse": {"samples": torch.zeros(1, 16, 1, 8, 12).to_sparse()},
    "rank 1": {"samples": torch.zeros(16)},
    "rank 3": {"samples": torch.zeros(16, 8, 12)},
    "rank 6": {"samples": torch.zeros(1, 1, 16, 1, 8, 12)},
    "no channels": {"samples": torch.zeros(1, 0, 1, 8, 12)},
    "another model's": {"samples": torch.ones(1, 4, 1, 8, 12)},
}


@pytest.mark.parametrize("latent", NO_LATENTS.values(), ids=NO_LATENTS)
def test_sample_refuses_what_is_no_latent(model: Any, latent: Any) -> None:
    with pytest.raises(QwenLowVRAMError, match="latent"):
        sample(model, latent_image=latent)
    assert model.model.transformer.store.fetched_blocks == 0


@pytest.mark.parametrize("latent", NO_LATENTS.values(), ids=NO_LATENTS)
def test_decode_refuses_what_is_no_latent(vae: Any, latent: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"samples|latents"):
        decode(vae, latent)


KSAMPLER_LATENTS = ("an empty batch", "no pixels", "NaN", "one infinity", "another model's")


@pytest.mark.parametrize("name", KSAMPLER_LATENTS)
def test_ksampler_with_our_model_refuses_what_is_no_latent(model: Any, name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"latent|noise"):
        ksampler(model, cond(), cond(5, 2), NO_LATENTS[name])
    assert model.model.transformer.store.fetched_blocks == 0


@pytest.mark.parametrize("latent", list(NO_LATENTS.values())[4:], ids=list(NO_LATENTS)[4:])
@pytest.mark.parametrize("tiled", [False, True])
def test_our_vae_refuses_what_is_no_latent(vae: Any, latent: Any, tiled: bool) -> None:
    samples = latent["samples"]
    with pytest.raises(InvalidRequest, match="latent"):
        vae.decode_tiled(samples, tile_x=8, tile_y=8) if tiled else vae.decode(samples)


@pytest.mark.parametrize("side", [NAN, INFINITY, -8, "8"])
def test_our_vae_refuses_tiles_without_a_size(vae: Any, side: Any) -> None:
    with pytest.raises(InvalidRequest, match="tile size"):
        vae.decode_tiled(torch.zeros(1, 16, 1, 8, 12), tile_x=side, tile_y=8)
    with pytest.raises(InvalidRequest, match="tile size"):
        vae.encode_tiled(torch.zeros(1, 64, 64, 3), tile_x=8, tile_y=side)


NO_IMAGES = {
    "nothing": None,
    "rank 3": torch.zeros(16, 16, 3),
    "an empty batch": torch.zeros(0, 16, 16, 3),
    "no pixels": torch.zeros(1, 0, 16, 3),
    "NaN": torch.full((1, 16, 16, 3), NAN),
    "whole numbers": torch.zeros(1, 16, 16, 3, dtype=torch.uint8),
    "fp8": torch.zeros(1, 16, 16, 3, dtype=torch.float8_e5m2),
    "numbers elsewhere": torch.zeros(1, 16, 16, 3, device="meta"),
    "sparse": torch.zeros(1, 16, 16, 3).to_sparse(),
    "no channels": torch.zeros(1, 16, 16, 0),
    "too small": torch.zeros(1, 4, 4, 3),
}


@pytest.mark.parametrize("image", NO_IMAGES.values(), ids=NO_IMAGES)
def test_our_vae_refuses_what_is_no_image(vae: Any, image: Any) -> None:
    with pytest.raises(InvalidRequest):
        vae.encode(image)


@pytest.mark.parametrize("image", list(NO_IMAGES.values())[1:], ids=list(NO_IMAGES)[1:])
def test_encode_edit_prompt_refuses_what_is_no_image(clip: Any, vae: Any, image: Any) -> None:
    from qwenimage_lowvram.nodes.encode_edit import QwenLowVRAMEncodeEditPrompt

    with pytest.raises(InvalidRequest, match=r"image1|Image 1"):
        QwenLowVRAMEncodeEditPrompt().encode(clip, vae, **EDIT, image1=image)


@pytest.mark.parametrize("image", list(NO_IMAGES.values())[1:-1], ids=list(NO_IMAGES)[1:-1])
def test_a_prompt_of_comfyuis_own_node_refuses_what_is_no_image(clip: Any, image: Any) -> None:
    with pytest.raises(InvalidRequest, match="image in a prompt"):
        clip.encode_from_tokens_scheduled(clip.tokenize("a cat", images=[image]))


NO_CONDITIONINGS = {
    "an empty list": [],
    "a text": "a cat",
    "a tensor": torch.zeros(1, 9, DIM),
    "no pairs": [embeds(9, 1)],
    "an empty entry": [[]],
    "no settings": [[embeds(9, 1), None]],
    "NaN": [[torch.full((1, 9, DIM), NAN), {}]],
    "infinity": [[torch.full((1, 9, DIM), INFINITY), {}]],
    "no tokens": [[torch.zeros(1, 0, DIM), {}]],
    "an empty batch": [[torch.zeros(0, 9, DIM), {}]],
    "whole numbers": [[torch.zeros(1, 9, DIM, dtype=torch.int64), {}]],
    "fp8": [[torch.zeros(1, 9, DIM, dtype=torch.float8_e4m3fn), {}]],
    "numbers elsewhere": [[torch.zeros(1, 9, DIM, device="meta"), {}]],
    "rank 2": [[torch.zeros(9, DIM), {}]],
    "no embeddings": [[None, {}]],
    "another model's": [[torch.zeros(1, 9, DIM + 1), {}]],
    "a mask without pixels": cond(mask=torch.zeros(1, 0, 0)),
    "a mask of NaN": cond(mask=torch.full((1, 8, 12), NAN)),
    "no mask": cond(mask="mask"),
    "a strength of NaN": cond(strength=NAN),
    "a mask's strength of NaN": cond(mask=torch.ones(1, 8, 12), mask_strength=NAN),
    "a mask's strength as a text": cond(mask=torch.ones(1, 8, 12), mask_strength="1"),
    "a mask's strength beyond floats": cond(mask=torch.ones(1, 8, 12), mask_strength=10**400),
    "a reference without pixels": cond(reference_latents=[torch.zeros(1, 16, 1, 0, 0)]),
    "a reference of NaN": cond(reference_latents=[torch.full((1, 16, 1, 4, 4), NAN)]),
    "another model's reference": cond(reference_latents=[torch.zeros(1, 4, 1, 4, 4)]),
    "a reference of rank 3": cond(reference_latents=[torch.zeros(16, 4, 4)]),
    "a reference of None": cond(reference_latents=[None]),
    "references as one tensor": cond(reference_latents=torch.zeros(2, 16, 1, 4, 4)),
    "references as a number": cond(reference_latents=5),
    "another prompt's attention mask": cond(attention_mask=torch.ones(1, 4, dtype=torch.int64)),
    "an attention mask as a list": cond(attention_mask=[1] * 9),
    "an area without pixels": cond(area=(0, 0, 0, 0)),
    "an area beyond the latent": cond(area=(4, 4, 100, 100)),
    "an area before the latent": cond(area=(4, 4, -8, -8)),
    "an area as a number": cond(area=5),
    "an area of two numbers": cond(area=("percentage", 0.5)),
    "an area of halves": cond(area=(1.5, 2.5, 0.5, 0)),
    "an area of truths": cond(area=(True, True, False, False)),
    "an area as a text": cond(area="abcd"),
    "an area of NaN": cond(area=("percentage", NAN, NAN, 0.0, 0.0)),
    "a range of NaN": cond(start_percent=NAN, end_percent=NAN),
}


@pytest.mark.parametrize("which", ["positive", "negative"])
@pytest.mark.parametrize("conditioning", NO_CONDITIONINGS.values(), ids=NO_CONDITIONINGS)
def test_sample_refuses_what_is_no_conditioning(model: Any, conditioning: Any, which: str) -> None:
    with pytest.raises(InvalidRequest):
        sample(model, **{which: conditioning}, cfg=3.0)
    assert model.model.transformer.store.fetched_blocks == 0


STRUCTURE = ("a text", "a tensor", "no pairs", "an empty entry", "no settings")  # ComfyUI's own, before our model


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", [name for name in NO_CONDITIONINGS if name not in STRUCTURE])
def test_ksampler_with_our_model_refuses_what_is_no_conditioning(model: Any, name: str, which: int) -> None:
    prompts = [cond(), cond(5, 2)]
    prompts[which] = NO_CONDITIONINGS[name]
    with pytest.raises(InvalidRequest):
        ksampler(model, *prompts, empty_latent())
    assert model.model.transformer.store.fetched_blocks == 0


def test_a_negative_prompt_that_is_not_computed_may_be_empty(model: Any) -> None:
    made = sample(model, negative=[], cfg=1.0)["result"][0]["samples"]
    assert torch.equal(made, sample(model, cfg=1.0)["result"][0]["samples"])


@pytest.mark.parametrize("cfg", [NAN, INFINITY, "3"])
def test_ksampler_with_our_model_refuses_a_guidance_that_is_no_number(model: Any, cfg: Any) -> None:
    with pytest.raises((InvalidRequest, TypeError)):
        ksampler(model, cond(), cond(5, 2), empty_latent(), cfg=cfg)


NO_MASKS = {
    "no pixels": torch.zeros(1, 0, 0),
    "no width": torch.ones(1, 8, 0),
    "no masks": torch.zeros(0, 8, 12),
    "NaN": torch.full((1, 8, 12), NAN),
    "rank 1": torch.ones(8),
    "whole numbers": torch.ones(1, 8, 12, dtype=torch.int64),
    "yes and no": torch.ones(1, 8, 12, dtype=torch.bool),
    "a text": "mask",
}


@pytest.mark.parametrize("mask", NO_MASKS.values(), ids=NO_MASKS)
def test_sample_refuses_what_is_no_noise_mask(model: Any, mask: Any) -> None:
    with pytest.raises(InvalidRequest, match="noise mask"):
        sample(model, latent_image={**empty_latent(), "noise_mask": mask})


def test_a_result_that_is_not_finite_is_an_error_and_no_black_image(model: Any) -> None:
    """A node of others that changes guidance by a number that is none."""
    from comfy_extras.nodes_model_advanced import RescaleCFG

    (rescaled,) = RescaleCFG().patch(model, NAN)
    with pytest.raises(InvalidRequest, match="sampled latents"):
        ksampler(rescaled, cond(), cond(5, 2), empty_latent())
    assert torch.isfinite(ksampler(model, cond(), cond(5, 2), empty_latent())).all()


@pytest.mark.parametrize("number", [NAN, INFINITY, -INFINITY])
def test_ksampler_with_our_model_refuses_a_noise_mask_that_is_not_finite(model: Any, number: float) -> None:
    mask = torch.ones(1, 1, 8, 12)
    mask[..., 3, 4] = number
    with pytest.raises(InvalidRequest, match="noise mask"):
        ksampler(model, cond(), cond(5, 2), {**empty_latent(), "noise_mask": mask})
    assert model.model.transformer.store.fetched_blocks == 0


@pytest.mark.parametrize("index", [[-1], [10**12], [NAN], ["0"], [], 0, "0"])
def test_sample_refuses_what_is_no_batch_index(model: Any, index: Any) -> None:
    with pytest.raises(InvalidRequest, match="batch_index"):
        sample(model, latent_image={**empty_latent(), "batch_index": index})


@pytest.mark.parametrize(
    "sigmas",
    [
        torch.full((5,), NAN),
        torch.tensor([INFINITY, 0.5, 0.0]),
        torch.linspace(1, 0, 20_000),
        torch.zeros(2, 2),
    ],
    ids=["NaN", "infinity", "20,000 steps", "rank 2"],
)
def test_a_sampler_of_ours_or_others_refuses_endless_and_odd_schedules(model: Any, sigmas: torch.Tensor) -> None:
    import comfy.sample
    import comfy.samplers

    latent = empty_latent()["samples"]
    with pytest.raises(InvalidRequest, match="schedule"):
        comfy.sample.sample_custom(
            model, latent, 3.0, comfy.samplers.sampler_object("euler"), sigmas, cond(), cond(5, 2), latent
        )
    assert model.model.transformer.store.fetched_blocks == 0


@pytest.mark.parametrize("strength", [NAN, INFINITY, None, "1"])
def test_comfyuis_own_lora_loaders_are_refused_strengths_that_are_no_numbers(model: Any, strength: Any) -> None:
    with pytest.raises(InvalidRequest, match="strength"):
        model.clone().add_patches({"diffusion_model.img_in.weight": torch.zeros(1)}, strength)


@pytest.mark.parametrize("other", [None, "model", 5])
def test_memory_report_and_load_lora_refuse_what_is_no_model(comfy: Any, other: Any) -> None:
    from qwenimage_lowvram.nodes.lora import QwenLowVRAMLoadLora
    from qwenimage_lowvram.nodes.memory_report import QwenLowVRAMMemoryReport

    with pytest.raises(QwenLowVRAMError):
        QwenLowVRAMMemoryReport().report(other)
    with pytest.raises(QwenLowVRAMError):
        QwenLowVRAMLoadLora().load(other, "a", 1.0)


NO_OBJECTS = (None, 5, "a text", {}, object(), torch.zeros(1))


@pytest.mark.parametrize("other", NO_OBJECTS, ids=range(len(NO_OBJECTS)))
def test_what_is_no_model_clip_or_vae_is_refused_by_name(clip: Any, vae: Any, other: Any) -> None:
    from qwenimage_lowvram.nodes.encode import QwenLowVRAMEncodePrompts
    from qwenimage_lowvram.nodes.encode_edit import QwenLowVRAMEncodeEditPrompt

    for name, call in (
        ("model", lambda: sample(other)),
        ("clip", lambda: QwenLowVRAMEncodePrompts().encode(other, "a", " ")),
        ("clip", lambda: QwenLowVRAMEncodeEditPrompt().encode(other, vae, **EDIT)),
        ("vae", lambda: QwenLowVRAMEncodeEditPrompt().encode(clip, other, **EDIT)),
        ("vae", lambda: decode(other, empty_latent())),
        ("vae", lambda: decode(other, empty_latent(), 64)),
    ):
        with pytest.raises(InvalidRequest, match=rf"^{name}\b"):
            call()


@pytest.mark.parametrize("number", [3e38, -3e38])
def test_what_overflows_in_the_vae_or_the_text_encoder_is_an_error(clip: Any, vae: Any, number: float) -> None:
    with pytest.raises(InvalidRequest, match="The VAE's output"):
        vae.encode(torch.full((1, 64, 64, 3), number))
    with pytest.raises(InvalidRequest, match="The VAE's output"):
        decode(vae, {"samples": torch.full((1, 16, 1, 8, 12), number)})
    with pytest.raises(InvalidRequest, match="The text encoder's output"):
        clip.encode_from_tokens(clip.tokenize("a cat", images=[torch.full((1, 64, 64, 3), number)]))


@pytest.mark.parametrize("ratio", [NAN, 0, -8, "8", [8], 1e9])
@pytest.mark.parametrize("name", ["downscale_ratio_spacial", "downscale_ratio_temporal"])
def test_sample_refuses_a_latents_ratio_that_is_none(model: Any, name: str, ratio: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"latent_image: its {name}"):
        sample(model, latent_image={**empty_latent(), name: ratio})


NO_TOKENS = ([5], [None], [()], "abc", torch.zeros(5))


@pytest.mark.parametrize("pairs", NO_TOKENS, ids=range(len(NO_TOKENS)))
def test_what_are_no_pairs_of_tokens_is_refused(clip: Any, pairs: Any) -> None:
    with pytest.raises(InvalidRequest, match="tokens"):
        clip.encode_from_tokens({"qwen25_7b": [pairs]})


def test_an_image_without_its_image_is_refused(clip: Any) -> None:
    with pytest.raises(InvalidRequest, match="image in a prompt"):
        clip.encode_from_tokens({"qwen25_7b": [[({"type": "image"}, 1.0)]]})
