"""Qwen-Image-2.1's transformer as a MODEL: ComfyUI's samplers, and what a graph may ask of it."""

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import DoesNotFit, InvalidRequest, Unsupported
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image_21.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image_21.latents import pack, unpack
from qwenimage_lowvram.engine.models.qwen_image_21.prefix import Prefix
from qwenimage_lowvram.engine.models.qwen_image_21.schedule import TURBO_SIGMAS, sigmas_21
from qwenimage_lowvram.engine.models.qwen_image_21.transformer import QwenImage21Transformer
from qwenimage_lowvram.engine.models.qwen_image_21.variants import Variant21
from qwenimage_lowvram.engine.models.qwen_image_21_vae.latent_statistics import normalised_latents, raw_latents
from qwenimage_lowvram.engine.planning.draft import least_bytes
from small_transformer_21 import PROMPT_DIM, random_weights, write_file
from torch import Tensor

from .test_model import ksampler

CPU = torch.device("cpu")
HEIGHT, WIDTH = 6, 4  # in tokens
SLOTS = (3, 5)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_file(tmp_path_factory.mktemp("small") / "qwen_image_2.1.safetensors", random_weights())


def opened(file: Path, variant: Variant21 | None = None) -> QwenImage21Transformer:
    hardware = Hardware.detect(CPU)
    return QwenImage21Transformer(open_checkpoint(file), dtype=torch.float32, hardware=hardware, variant=variant)


def model_of(file: Path, limit_bytes: int | None = None, **options: Any) -> Any:
    from qwenimage_lowvram.nodes.adapters.model_21 import make_model_21

    return make_model_21(opened(file, **options), limit_bytes)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int, references: int = 0) -> list[Any]:
    """A CONDITIONING as ComfyUI's own node for the model makes it."""
    values: dict[str, Any] = {"pooled_output": None}
    if references:
        latents = [random(1, 64, 4, 2 * (i + 1), seed=20 + i) for i in range(references)]
        values |= {"reference_latents": latents, "image_slots": list(SLOTS[:references])}
    return [[random(1, 9 + seed, PROMPT_DIM, seed=seed), values]]


def latent(batch: int = 1, height: int = HEIGHT, width: int = WIDTH) -> dict[str, Tensor]:
    return {"samples": torch.zeros(batch, 64, height, width)}


def prefix_of(conditioning: list[Any]) -> Prefix:
    text, values = conditioning[0]
    references = [normalised_latents(latent) for latent in values.get("reference_latents", ())]
    shapes = tuple((latent.shape[-2], latent.shape[-1]) for latent in references)
    return Prefix(text, tuple(map(pack, references)), shapes, tuple(values.get("image_slots", ())))


def by_hand(file: Path, positive: Any, negative: Any, noise: Tensor, sigmas: Tensor, cfg: float) -> Tensor:
    """Euler's method on the transformer itself, with guidance as the reference has it."""
    transformer = opened(file)
    transformer.load(range(len(transformer.store.blocks)))
    prefixes = [prefix_of(conditioning) for conditioning in (positive, negative)]
    x = noise.clone()
    with transformer.session(slots=1) as session:
        for sigma, following in pairwise(sigmas):
            branches = [
                Branch(pack(image), (image.shape[-2], image.shape[-1]), prefix, float(sigma))
                for prefix in prefixes
                for image in x.split(1)
            ]
            answers = [unpack(answer, *x.shape[-2:]) for answer in session.forward(branches)]
            cond, uncond = torch.cat(answers[: len(x)]), torch.cat(answers[len(x) :])
            x = x + (uncond + cfg * (cond - uncond)) * (following - sigma)
    return raw_latents(x)


def sample(model: Any, positive: Any, negative: Any, image: dict[str, Tensor], **settings: Any) -> Any:
    from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

    options = {"seed": 3, "steps": 4, "cfg": 3.0, "sampler": "euler", "scheduler": "qwen_image", "denoise": 1.0}
    options |= {"norm_rescale": True, **settings}
    return QwenLowVRAMSample().sample(model, positive, negative, image, **options)["result"][0]["samples"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("references", [0, 1, 2])
def test_sample_takes_the_references_schedule_and_guidance(comfy: Any, file: Path, references: int, batch: int) -> None:
    import comfy.sample

    positive, negative, image = prompt(1, references), prompt(2, references), latent(batch)
    noise = comfy.sample.prepare_noise(image["samples"], 3)
    wanted = by_hand(file, positive, negative, noise, sigmas_21(4, HEIGHT * WIDTH), 3.0)
    found = sample(model_of(file), positive, negative, image)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("hidden", [0, 3])
def test_a_mask_is_looked_at_once_before_the_run(comfy: Any, file: Path, hidden: int, monkeypatch: Any) -> None:
    """One that hides nothing is none; what another one holds is not asked for while the card computes."""
    positive, negative = prompt(1, 1), prompt(2, 1)
    model = model_of(file)
    plain = ksampler(model, positive, negative, latent())
    mask = torch.ones(1, positive[0][0].shape[1], dtype=torch.long)
    mask[:, len(mask[0]) - hidden :] = 0
    positive[0][1]["attention_mask"] = mask
    looked: list[bool] = []
    monkeypatch.setattr(Tensor, "__bool__", counted(Tensor.__bool__, looked))
    steps = []
    for count in (2, 4):
        looked.clear()
        masked = ksampler(model, positive, negative, latent(), steps=count)
        steps.append(len(looked))
    assert torch.equal(masked, plain) == (hidden == 0)
    assert steps[0] == steps[1]


def counted(function: Any, calls: list[bool]) -> Any:
    def call(tensor: Tensor) -> bool:
        calls.append(True)
        return bool(function(tensor))

    return call


def test_ksampler_has_comfyuis_own_shift_and_each_block_is_visited_once_per_step(comfy: Any, file: Path) -> None:
    model = model_of(file)
    ksampler(model, prompt(1), prompt(2), latent())
    shift = model.get_model_object("model_sampling").shift
    report = model.model.last_report
    assert shift == pytest.approx(0.69)
    assert report.passes == report.steps


def test_streamed_is_resident_bit_for_bit_within_the_limit(comfy: Any, file: Path) -> None:
    conds = prompt(1, 2), prompt(2, 2)
    roomy = model_of(file)
    image = ksampler(roomy, *conds, latent())
    most = roomy.model.last_report.plan
    roomy.model.transformer.unload()  # of one limit, what others hold is left out
    tight = model_of(file, least_bytes(roomy.model.transformer.footprint, most.request) + 64 * 1024)
    assert torch.equal(ksampler(tight, *conds, latent()), image)
    fewest = tight.model.last_report.plan
    assert len(fewest.resident) < len(most.resident)
    assert fewest.peak_bytes <= fewest.limit_bytes
    with pytest.raises(DoesNotFit):
        ksampler(model_of(file, 1024), *conds, latent())


def test_an_empty_latent_of_comfyuis_is_brought_to_its_size_and_channels(comfy: Any, file: Path) -> None:
    empty = {"samples": torch.zeros(1, 4, 2 * HEIGHT, 2 * WIDTH), "downscale_ratio_spacial": 8}
    model = model_of(file)
    conds = prompt(1), prompt(2)
    assert torch.equal(sample(model, *conds, empty), sample(model, *conds, latent()))


def test_turbo_takes_its_eight_sigmas_and_no_other_number_of_steps(comfy: Any, file: Path) -> None:
    import comfy.sample

    model = model_of(file, variant=Variant21.TURBO)
    positive, negative = prompt(1), prompt(2)
    found = sample(model, positive, negative, latent(), steps=8, cfg=1.0)
    noise = comfy.sample.prepare_noise(latent()["samples"], 3)
    wanted = by_hand(file, positive, negative, noise, torch.tensor([*TURBO_SIGMAS, 0.0]), 1.0)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    with pytest.raises(InvalidRequest, match=r"Qwen-Image-2.1-Turbo was made for 8 steps"):
        sample(model, positive, negative, latent(), steps=20, cfg=1.0)


@pytest.mark.parametrize("other", ["latents", "channels", "prompt", "reference", "slots", "half a token"])
def test_what_is_of_another_model_is_named_before_anything_is_loaded(comfy: Any, file: Path, other: str) -> None:
    positive, image, match = prompt(1, 1), latent(), ""
    values = positive[0][1]
    if other == "latents":
        image, match = {"samples": torch.zeros(1, 64, 1, 4, 4)}, "have four dimensions"
    elif other == "channels":
        image, match = {"samples": torch.ones(1, 16, 4, 4)}, "channels"
    elif other == "prompt":
        positive, match = [[random(1, 4, 7, seed=1), {}]], "have 7 dimensions, but 48 are needed"
    elif other == "reference":
        values["reference_latents"], match = [torch.zeros(1, 16, 1, 4, 4)], "of 16 channels, but 64 are needed"
    elif other == "slots":
        match = r"images \(1\) and the places it has for them \(0\) do not match"
        del values["image_slots"]
    else:
        values["reference_latents"], match = [torch.zeros(1, 64, 5, 4)], "half a token out of line"
    model = model_of(file)
    with pytest.raises((InvalidRequest, Unsupported), match=match):
        ksampler(model, positive, positive if other != "prompt" else prompt(2), image)
    assert not model.model.transformer.store.resident


def test_the_cache_node_of_comfyui_is_said_not_to_be_followed(
    comfy: Any, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(file)
    options = model.model_options.setdefault("transformer_options", {})
    options["qwen_image21_cache"] = {"device": "gpu", "dtype": "int8"}
    with caplog.at_level(logging.WARNING, logger="qwen_lowvram"):
        ksampler(model, prompt(1), prompt(2), latent())
    assert "QwenImage21Cache (device gpu, dtype int8) is not followed" in caplog.text


def test_an_edit_in_the_size_that_makes_near_copies_is_warned_of(
    comfy: Any, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(file)
    warned = []
    for references, size in ((1, 64), (0, 64), (1, 66)):
        conds = {
            "positive": [{"cross_attn": prompt(1)[0][0], "reference_latents": [torch.zeros(1, 64, 4, 4)] * references}]
        }
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="qwen_lowvram"):
            model.model.request_of(conds, torch.zeros(1, 64, size, size), torch.tensor([1.0, 0.0]))
        warned.append("near-copies of the image with halos" in caplog.text)
    assert warned == [True, False, False]
