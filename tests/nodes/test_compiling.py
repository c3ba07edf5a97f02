"""ComfyUI's TorchCompileModel on our models: their blocks are compiled in its place, and what fails is no loss."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.planning import footprint
from qwenimage_lowvram.engine.planning.draft import least_bytes
from torch import Tensor

from .conftest import NAME_21, cond, empty_latent
from .test_model import ksampler


def compiled_by_node(model: Any, backend: str, **options: Any) -> Any:
    """As the node does it."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = model.clone()
    set_torch_compile_wrapper(model=clone, backend=backend, **options)
    return clone


@torch.inference_mode()
def run(model: Any, **size: int) -> Tensor:
    samples: Tensor = ksampler(model, cond(9), cond(5, 2), empty_latent(**size))
    return samples


@pytest.mark.slow
def test_a_compile_node_has_the_blocks_compiled_once_for_all_steps_and_prompts(model: Any) -> None:
    expected, compiled = run(model), compiled_by_node(model, "aot_eager")
    assert torch.equal(run(compiled), expected)
    report = model.model.last_report
    assert (report.compiled, report.compiled_times, report.not_compiled) == ("exact", 1, "")
    assert "  compiled: 1 time, " in str(report)
    assert torch.equal(run(compiled.clone()), expected)  # as after another node, and with another seed
    assert (model.model.last_report.compiled, model.model.last_report.compiled_times) == ("exact", 0)
    assert torch.equal(run(model), expected)
    assert not model.model.last_report.compiled  # nothing of it is left


def test_what_a_compile_node_sets_is_named_where_it_is_not_followed_and_a_failure_is_no_loss(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch._dynamo

    asked = []

    def fail(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler is found")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: asked.append(name) or fail)
    expected = run(model)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(compiled_by_node(model, "cudagraphs", mode="max-autotune")), expected)
    assert asked[-1] == "inductor"  # before it, the one that the node makes
    told = [record.getMessage() for record in caplog.records]
    assert any("backend cudagraphs, mode max-autotune is ignored" in line for line in told)
    assert len([line for line in told if "no compiler is found. Blocks are computed without it" in line]) == 1
    report = model.model.last_report
    assert "  blocks not compiled: torch.compile failed: RuntimeError no compiler is found" in str(report)
    assert not report.compiled
    assert torch.equal(run(model), expected)
    assert model.model.last_report.not_compiled == ""


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of inductor, which needs a C++ compiler."""
    import torch._dynamo

    find = torch._dynamo.lookup_backend
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: find("aot_eager"))


@pytest.mark.slow
@pytest.mark.usefixtures("aot_eager")
def test_the_loaders_compile_does_what_the_node_does(diffusers_21: Path, models: Any) -> None:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    models("diffusers", str(diffusers_21))
    files = {"transformer": f"{NAME_21} (folder)", "text_encoder": "from the folder", "vae": "from the folder"}
    settings = {"dtype": "fp32", "weight_format": "auto", "vram_limit_gb": 0.0, "timesteps": "fp32"}
    latents, reports = [], []
    for compile in (False, True):
        model, clip, _ = QwenLowVRAMLoader().load(**files, **settings, compile=compile)
        prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
        latents.append(ksampler(model, prompt, prompt, {"samples": torch.zeros(1, 64, 4, 4)}))
        reports.append(model.model.last_report)
    assert torch.equal(*latents)
    assert (reports[0].compiled, reports[0].plan.compiled) == ("", "")
    assert (reports[1].compiled, reports[1].plan.compiled, reports[1].not_compiled) == ("exact", "exact", "")
    assert reports[1].compiled_times == 1
    node = compiled_by_node(model, "eager")
    ksampler(node, prompt, prompt, {"samples": torch.zeros(1, 64, 4, 4)})
    assert node.model.transformer.compiled.settings.backend == "eager"  # what a node says comes first


def test_what_fits_in_chunks_alone_is_not_compiled(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "MLP_CHUNKS", (None, 64))
    large = {"height": 512, "width": 512}  # so that activations are the most of it
    expected, sizes = run(model, **large), model.model.transformer.footprint
    monkeypatch.setattr(model.model, "limit_bytes", least_bytes(sizes, model.model.last_report.plan.request))
    assert torch.equal(run(compiled_by_node(model, "aot_eager"), **large), expected)
    assert "in chunks" in model.model.last_report.not_compiled
    assert model.model.last_report.plan.mlp_chunk_tokens == 64


def test_where_compute_is_fast_code_may_round_in_another_way_and_that_is_said(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._dynamo

    def rounding(graph: Any, inputs: Any) -> Any:
        return lambda *args: [part * (1 + 1e-6) for part in graph(*args)]

    expected, compiled = run(model), compiled_by_node(model, "inductor")
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: rounding)
    assert torch.equal(run(compiled), expected)
    assert "not the same bits" in model.model.last_report.not_compiled
    monkeypatch.setattr(model.model, "exact", False)
    assert not torch.equal(run(compiled), expected)
    report = model.model.last_report
    assert "blocks compiled (not exact)" in str(report.plan)
    assert "not exact: errors of a block up to 1e-06" in str(report)
    assert report.not_compiled == ""
