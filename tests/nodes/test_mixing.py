"""Our MODEL, CLIP and VAE among other people's nodes: honoured or refused in words, in any order of events."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import Unsupported
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.request import SamplingRequest

from .conftest import cond, empty_latent
from .test_model import ksampler


def sample(model: Any, **options: Any) -> torch.Tensor:
    """The samples of our own sampler node."""
    from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

    settings = {"seed": 5, "steps": 4, "cfg": 4.0, "denoise": 1.0, "norm_rescale": True} | options
    out = QwenLowVRAMSample().sample(
        model, cond(), cond(5, 2), empty_latent(), sampler="euler", scheduler="qwen_image", **settings
    )
    result: torch.Tensor = out["result"][0]["samples"]
    return result


def test_another_nodes_guidance_is_used_or_refused_never_dropped(model: Any) -> None:
    from comfy_extras.nodes_model_advanced import RescaleCFG

    rescaled = RescaleCFG().patch(model, 0.7)[0]
    assert not torch.equal(sample(rescaled, norm_rescale=False), sample(model, norm_rescale=False))
    with pytest.raises(Unsupported, match="norm_rescale"):
        sample(rescaled)


@pytest.mark.parametrize("enough_first", [True, False])
def test_calls_that_comfyui_would_batch_differently_the_second_time_stay_together(
    model: Any, monkeypatch: pytest.MonkeyPatch, enough_first: bool
) -> None:
    import comfy.model_management as management

    expected = ksampler(model, cond(9), cond(9, 2), empty_latent())
    asked = 0

    def free(*_: Any, torch_free_too: bool = False) -> Any:
        nonlocal asked
        asked += 1
        value = 64 << 30 if (asked % 2 == 1) == enough_first else 1 << 30
        return (value, value) if torch_free_too else value

    monkeypatch.setattr(management, "get_free_memory", free)
    assert torch.equal(ksampler(model, cond(9), cond(9, 2), empty_latent()), expected)
    assert asked > 2


@pytest.mark.parametrize("leave", ["a block", "everything"])
@pytest.mark.parametrize("spare_blocks", [0, 2, 9])
def test_memory_asked_for_between_two_steps_is_given_and_the_image_is_the_same(
    model: Any, transformer: QwenImageTransformer, leave: str, spare_blocks: int
) -> None:
    expected = ksampler(model, cond(), cond(5, 2), empty_latent())
    least = least_bytes(transformer.footprint, SamplingRequest(96, 64, 2, 9))
    model.model.limit_bytes = least + spare_blocks * transformer.footprint.slot_bytes
    passes = 0
    together = model.model.calls.run_together

    def run_together(calls: Any) -> Any:
        nonlocal passes
        result = together(calls)
        passes += 1
        if passes == 2 and leave == "a block":
            model.partially_unload(torch.device("cpu"), 1)
        elif passes == 2:
            model.detach()
        return result

    model.model.calls.run_together = run_together
    assert torch.equal(ksampler(model, cond(), cond(5, 2), empty_latent()), expected)


def test_no_file_is_open_between_runs(model: Any, transformer: QwenImageTransformer) -> None:
    import psutil

    ksampler(model, cond(), cond(5, 2), empty_latent())
    model.model.limit_bytes = least_bytes(transformer.footprint, SamplingRequest(96, 64, 2, 9))
    ksampler(model, cond(), cond(5, 2), empty_latent())
    assert not [file.path for file in psutil.Process().open_files() if file.path.endswith(".safetensors")]


def test_an_interruption_of_the_timestep_table_leaves_nothing_open(model: Any) -> None:
    import comfy.model_management as management
    import psutil

    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        ksampler(model, cond(), cond(5, 2), empty_latent())
    assert not [file.path for file in psutil.Process().open_files() if file.path.endswith(".safetensors")]
    assert torch.isfinite(ksampler(model, cond(), cond(5, 2), empty_latent())).all()


def test_the_vae_does_not_ask_itself_to_leave(
    comfy: Any, small_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management
    from qwenimage_lowvram.nodes.adapters.limits import stage_bytes
    from qwenimage_lowvram.nodes.adapters.vae import make_vae

    vae = make_vae(open_checkpoint(small_pipeline / "vae"), dtype=torch.float32, limit_bytes=None)
    monkeypatch.setattr(vae.patcher, "load_device", torch.device("meta"))
    loaded = management.LoadedModel(vae.patcher)
    asked: list[bool] = []
    monkeypatch.setattr(management.LoadedModel, "model_unload", lambda *_: asked.append(True) or True)
    monkeypatch.setattr(management.LoadedModel, "is_dead", lambda _: False)
    monkeypatch.setattr(management, "current_loaded_models", [loaded])
    free = 300 << 20
    monkeypatch.setattr(
        management, "get_free_memory", lambda *_, torch_free_too=False: (free, 0) if torch_free_too else free
    )
    monkeypatch.setattr(management, "soft_empty_cache", lambda *_: None)
    stage_bytes(torch.device("meta"), None, 500 << 20, reused=vae.patcher)
    assert not asked
    stage_bytes(torch.device("meta"), None, 500 << 20)
    assert asked


def test_a_linked_input_of_the_loader_is_left_to_the_run(comfy: Any) -> None:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    assert asyncio.run(QwenLowVRAMLoader.VALIDATE_INPUTS(None)) is True
