"""A network that the pack has never seen: told from its file, planned, streamed, and sampled with by ComfyUI's own
KSampler, without a line in engine/ or nodes/."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import DoesNotFit, InvalidRequest, Unsupported, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.recognition import identify, require
from qwenimage_lowvram.engine.planning.draft import least_bytes

from .test_model import ksampler

HOST = Hardware.detect(torch.device("cpu"))
KiB = 1024


@pytest.fixture
def toy(comfy: Any, tmp_path: Path) -> Any:
    """The module that defines it, with its weights written to `file` and as one `whole`."""
    from . import toy_network

    toy_network.file = tmp_path / "toy.safetensors"
    toy_network.whole = toy_network.write_toy(toy_network.file)
    return toy_network


def prompt(toy: Any, seed: int) -> list[Any]:
    return [[torch.randn(1, 5, toy.PROMPT_WIDTH, generator=torch.Generator().manual_seed(seed)), {}]]


def latent(batch: int = 1) -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(batch, 4, 6, 10)}


def native(toy: Any) -> Any:
    """ComfyUI's own model around the whole network."""
    import comfy.model_base
    import comfy.model_patcher

    class OneByOne(torch.nn.Module):
        dtype = torch.float32

        def forward(self, x: Any, sigmas: Any, context: Any, **_: Any) -> Any:
            return torch.cat([toy.whole(x[i : i + 1], context[i : i + 1], sigmas[i]) for i in range(len(x))])

    class Native(comfy.model_base.BaseModel):
        def __init__(self) -> None:
            super().__init__(toy.ToyConfig({"disable_unet_model_creation": True}), device=torch.device("cpu"))
            self.diffusion_model = OneByOne()

    return comfy.model_patcher.ModelPatcher(Native(), torch.device("cpu"), torch.device("cpu"))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_it_samples_as_comfyuis_own_model_of_it_does(toy: Any, sampler: str, batch: int) -> None:
    conds = prompt(toy, 1), prompt(toy, 2)
    model = toy.toy_model(toy.ToyTransformer(toy.file, hardware=HOST), None)
    ours = ksampler(model, *conds, latent(batch), sampler)
    assert torch.equal(ours, ksampler(native(toy), *conds, latent(batch), sampler))
    report = model.model.last_report
    assert (report.passes, report.modulation_bytes) == (report.steps, 0)


def test_its_blocks_are_streamed_within_a_limit_and_the_image_stays(toy: Any) -> None:
    conds = prompt(toy, 1), prompt(toy, 2)
    roomy = toy.toy_model(toy.ToyTransformer(toy.file, hardware=HOST), None)
    image = ksampler(roomy, *conds, latent())
    most = roomy.model.last_report.plan
    least = least_bytes(roomy.model.transformer.footprint, most.request)
    tight = toy.toy_model(toy.ToyTransformer(toy.file, hardware=HOST), least + 8 * KiB)  # the other one holds some
    assert torch.equal(ksampler(tight, *conds, latent()), image)
    fewest = tight.model.last_report.plan
    assert len(fewest.resident) < len(most.resident) == toy.BLOCKS
    assert fewest.peak_bytes <= fewest.limit_bytes
    assert tight.model.last_report.fetched_blocks > roomy.model.last_report.fetched_blocks


def test_what_does_not_fit_and_what_it_cannot_do_is_refused(toy: Any) -> None:
    conds = prompt(toy, 1), prompt(toy, 2)
    with pytest.raises(DoesNotFit, match="Sampling needs"):
        ksampler(toy.toy_model(toy.ToyTransformer(toy.file, hardware=HOST), 2 * KiB), *conds, latent())
    model = toy.toy_model(toy.ToyTransformer(toy.file, hardware=HOST), None)
    with pytest.raises(InvalidRequest, match="A toy makes images"):
        ksampler(model, *conds, {"samples": torch.zeros(1, 4, 1, 6, 10)})


def test_a_controlnet_or_a_patch_that_it_would_not_see_is_refused(toy: Any) -> None:
    model = toy.toy_model(toy.ToyTransformer(toy.file, hardware=HOST), None)
    with pytest.raises(Unsupported, match="A ControlNet for this kind of model"):
        model.model.check_beside({"positive": [{"control": SimpleNamespace()}]}, {})
    model.set_model_patch(lambda args: args, "double_block")
    with pytest.raises(Unsupported, match="A patch around this model's blocks"):
        ksampler(model, prompt(toy, 1), prompt(toy, 2), latent())


def test_its_file_is_told_from_others_by_a_table_that_is_passed_in(toy: Any, small_pipeline: Path) -> None:
    from qwenimage_lowvram.nodes.adapters.networks import SERVED, served_of

    mine, other = open_checkpoint(toy.file), open_checkpoint(small_pipeline / "transformer")
    assert identify(mine.tensors, toy.TABLE) is toy.TOY
    assert identify(mine.tensors) is not toy.TOY
    served = toy.served(SERVED[0])
    assert served_of(mine, (*SERVED, served)) is served
    assert served_of(other, (served, *SERVED)) is SERVED[0]
    with pytest.raises(WrongModel, match=r"is a Qwen-Image transformer .*; a toy transformer is needed here"):
        require(other, toy.TOY, toy.TABLE)
