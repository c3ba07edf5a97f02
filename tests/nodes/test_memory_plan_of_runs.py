"""What Memory Plan plans is what the sampler plans for the loader's same settings."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import make_parts, write_lora
from qwenimage_lowvram.engine.compute.linear_choice import Computing
from qwenimage_lowvram.engine.compute.step_schedules import step_cache_of
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.lora_file import open_lora
from qwenimage_lowvram.engine.models.families import QWEN_IMAGE
from qwenimage_lowvram.engine.planning.forecast import TYPICAL
from qwenimage_lowvram.engine.planning.request import GIB
from qwenimage_lowvram.engine.planning.stages import ImageRequest
from small_checkpoint import SplitFiles, write_split_files

from .conftest import cond, empty_latent, sample

CARD = replace(Hardware.detect(torch.device("cpu")), host_device=False)
LIMIT_GB = 0.25
SIZE = {"width": 96, "height": 64}


@pytest.fixture
def files(full_pipeline: Path, models: Callable[[str, Path], None], tmp_path: Path) -> Callable[[str], SplitFiles]:
    def write(dtype: str) -> SplitFiles:
        made = write_split_files(full_pipeline, tmp_path, dtype=dtype, text_dtype="bf16")
        for kind in ("diffusion_models", "text_encoders", "vae"):
            models(kind, tmp_path / kind)
        return made

    return write


@pytest.fixture(autouse=True)
def a_card(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the models are concerned, of speeds that nobody has to measure."""
    from qwenimage_lowvram.engine.runs.known_speeds import KnownSpeeds
    from qwenimage_lowvram.nodes import devices

    monkeypatch.setattr(devices, "hardware_of", lambda device: CARD)
    monkeypatch.setattr(KnownSpeeds, "get", lambda self: TYPICAL)


SETTINGS: dict[str, dict[str, Any]] = {
    "int8, auto": {"stored": "int8_convrot"},
    "int8, exact": {"stored": "int8_convrot", "compute": "exact"},
    "bf16 as int8, fast": {"stored": "bf16", "weight_format": "int8", "compute": "fast"},
    "step cache": {"stored": "bf16", "step_cache": "planned_20", "steps": 40},
    "first block": {"stored": "bf16", "step_cache": "first_block"},
    "compiled": {"stored": "bf16", "compile": True},
    "attention in chunks": {"stored": "bf16", "attention": "split"},
    "fp16 products, not compiled": {"stored": "bf16", "dtype": "fp16", "compile": True},
    "fp16 products": {"stored": "bf16", "dtype": "fp16"},
    "fp16 products of int8": {"stored": "int8_row", "dtype": "fp16"},
    "a LoRA": {"stored": "bf16", "rank": 16},
    "a LoRA on int8, fast": {"stored": "int8_row", "compute": "fast", "rank": 16},
}
ON_STORED = ("int8, auto", "bf16 as int8, fast", "fp16 products of int8", "a LoRA on int8, fast")
LAYERS = ("attn.to_q", "attn.add_v_proj")


@pytest.mark.slow
@pytest.mark.parametrize("case", SETTINGS)
def test_a_plan_is_that_of_the_run(
    case: str, files: Callable[[str], SplitFiles], models: Callable[[str, Path], None], tmp_path: Path
) -> None:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader
    from qwenimage_lowvram.nodes.lora import QwenLowVRAMLoadLora
    from qwenimage_lowvram.nodes.planned_models import PlannedModels, PlanSettings
    from qwenimage_lowvram.nodes.sources import Sources

    asked = {"dtype": "bf16", "weight_format": "auto", "compute": "auto", "step_cache": "off", "steps": 4}
    asked |= SETTINGS[case]
    stored, steps, rank = asked.pop("stored"), asked.pop("steps"), asked.pop("rank", 0)
    names = files(stored)
    chosen = {"transformer": names.transformer, "text_encoder": names.text_encoder, "vae": names.vae}
    limits = {"vram_limit_gb": LIMIT_GB, "ram_limit_gb": 1.0}
    model, _, _ = QwenLowVRAMLoader().load(**chosen, **asked, **limits, timesteps="fp32")
    loras = []
    if rank:
        layers = {f"transformer_blocks.{i}.{name}": (64, 64) for i in range(4) for name in LAYERS}
        parts = {name: make_parts("lora", shape, rank=rank) for name, shape in layers.items()}
        (tmp_path / "loras").mkdir()
        loras = [open_lora(write_lora(tmp_path / "loras" / "a.safetensors", parts))]
        models("loras", tmp_path / "loras")
        model = QwenLowVRAMLoadLora().load(model, "a.safetensors", 0.7)["result"][0]
    sample(model, positive=cond(), negative=cond(), latent_image=empty_latent(**SIZE), steps=steps, cfg=4.0)
    made = model.model.plan

    compiled = asked.get("compile", False)
    attention = asked.get("attention", "auto")
    settings = PlanSettings(
        asked["weight_format"], asked["dtype"], Computing(asked["compute"]), compiled, attention=attention
    )
    planned = PlannedModels.open(Sources.of(**chosen), settings, layers=0, images=0, loras=loras)
    tokens = 9 - QWEN_IMAGE.prompts.behind
    cache = step_cache_of(asked["step_cache"])
    request = ImageRequest(
        **SIZE, batch=1, guided=True, steps=steps, prompt_tokens=tokens, prompts=planned.prompts, step_cache=cache
    )
    limit = int(LIMIT_GB * GIB)
    plan = planned.card(request, "a card", limit, limit, GIB).plan
    assert plan is not None
    assert made.limits == plan.limits
    assert replace(plan.sampling, request=made.request) == made
    assert replace(plan.sampling.request, prompts=0) == made.request
    assert ("int8 by comfy-kitchen" in str(made)) == (case in ON_STORED)
    if rank:
        plain = PlannedModels.open(Sources.of(**chosen), settings, layers=0, images=0)
        without = plain.card(request, "a card", limit, limit, GIB).plan
        assert without is not None
        assert made.sampling_peak_bytes > without.sampling.sampling_peak_bytes
    assert made.in_half == case.startswith("fp16")
    assert made.attention == ("split" if case == "attention in chunks" else "pytorch")
    assert made.compiled == ("exact" if case == "compiled" else "")


@pytest.mark.slow
def test_what_is_not_exact_is_said_on_the_node(files: Callable[[str], SplitFiles]) -> None:
    from qwenimage_lowvram.engine.errors import InvalidRequest
    from qwenimage_lowvram.nodes.memory_plan import QwenLowVRAMMemoryPlan

    names = files("int8_row")
    inputs: dict[str, Any] = {
        **{"transformer": names.transformer, "text_encoder": names.text_encoder, "vae": names.vae},
        **{"weight_format": "auto", "batch_size": 1, "steps": 40, "cfg": 4.0, "prompt_tokens": 60},
        **{"vram_limit_gb": 0.0, "ram_limit_gb": 1.0, **SIZE},
    }
    text = QwenLowVRAMMemoryPlan().plan(**inputs, dtype="fp16", step_cache="planned_20")["result"][0]
    products = "auto" if "\nauto: products" in text else "as stored"
    assert f"\n{products}: products in fp16 between activations in fp32, linear layers in int8 by" in text
    assert "\nnot exact: 20 of 40 steps computed" in text
    assert "nobody has measured" in text
    exact = QwenLowVRAMMemoryPlan().plan(**inputs, dtype="bf16", compute="exact")["result"][0]
    assert "exact" not in exact
    quantizing = QwenLowVRAMMemoryPlan().plan(**inputs, dtype="bf16", compute="exact", attention="sage")["result"][0]
    assert "\nattention sage (not exact)" in quantizing
    with pytest.raises(InvalidRequest, match=r"^step_cache: .*a table for runs of 40 steps; this run has 20"):
        QwenLowVRAMMemoryPlan().plan(**{**inputs, "steps": 20}, step_cache="planned_20")
    for wrong in ({"dtype": "fp8"}, {"compute": "faster"}, {"step_cache": "planned_13"}, {"attention": "fast"}):
        with pytest.raises(InvalidRequest, match=next(iter(wrong))):
            QwenLowVRAMMemoryPlan().plan(**inputs, **wrong)
