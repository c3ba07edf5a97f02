"""The line that a graph is told before it runs: the planner's own numbers, and its refusal."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from control_files import write_diffsynth, write_instantx
from lora_files import make_parts, write_lora
from qwenimage_lowvram.engine.errors import DoesNotFit
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.planning.forecast import TYPICAL
from qwenimage_lowvram.nodes import live_plan
from qwenimage_lowvram.nodes.graph_runs import runs_of
from qwenimage_lowvram.nodes.live_plan import PlanLine, line_of, lines_of, refusal_of, refuse_what_cannot_run
from safetensors.torch import load_file, save_file

CARD = Hardware(torch.device("cpu"), streams=False, pinned=False, prefetch=True, host_device=False)
FOLDER = "from the folder"


@pytest.fixture
def graph(models: Callable[[str, Path], None], small_pipeline: Path) -> Callable[..., dict[str, Any]]:
    """`graph(width=64, **loader's widgets)`: a prompt of a small pipeline folder."""
    models("diffusers", small_pipeline.parent)

    def make(width: int = 64, **settings: Any) -> dict[str, Any]:
        loader = {
            "transformer": f"{small_pipeline.name} (folder)",
            "text_encoder": FOLDER,
            "vae": FOLDER,
            "dtype": "fp32",
        }
        sample = {"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 1], "latent_image": ["3", 0]}
        nodes = {
            "1": ("QwenLowVRAMLoader", loader | settings),
            "2": ("QwenLowVRAMEncodePrompts", {"clip": ["1", 1], "positive": "a cat", "negative": " "}),
            "3": ("EmptySD3LatentImage", {"width": width, "height": 64, "batch_size": 1}),
            "4": ("QwenLowVRAMSample", {**sample, "steps": 4, "cfg": 4.0}),
        }
        return {node: {"class_type": kind, "inputs": inputs} for node, (kind, inputs) in nodes.items()}

    return make


def test_the_line_has_the_numbers_of_the_plan_and_both_nodes(graph: Callable[..., dict[str, Any]]) -> None:
    (line,) = lines_of(graph(vram_limit_gb=1.0, ram_limit_gb=4.0))
    assert line.nodes == ("1", "4")
    assert line.fits
    assert line.values["limit_bytes"] == 2**30
    assert 0 < line.values["peak_bytes"] <= 2**30
    assert line.values["resident"] == line.values["blocks"]
    assert "blocks on the card" in line.text
    assert "of 1.00 GiB" in line.text
    assert "on a typical card" in line.text


def test_all_cards_are_planned_with_where_the_loader_uses_them(
    graph: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenimage_lowvram.nodes import devices, planned_models

    slow = replace(TYPICAL, flops=1e8)  # so that computing counts
    monkeypatch.setattr(planned_models, "remembered_speeds", lambda *of_machine: slow)
    monkeypatch.setattr(live_plan, "speeds_stamp", lambda: "slow")
    monkeypatch.setattr(devices, "_accelerators", lambda: ["cpu", "cpu:0"])  # which cost nothing to look at
    monkeypatch.setattr(devices, "hardware_of", lambda device: CARD)
    (alone,) = lines_of(graph(vram_limit_gb=1.0, ram_limit_gb=4.0))
    (line,) = lines_of(graph(vram_limit_gb=1.0, ram_limit_gb=4.0, transformer_device="all cards"))
    assert alone.values["further"] == []
    (other,) = line.values["further"]
    assert (other["device"], other["limit_bytes"]) == ("cpu:0", 2**30)
    assert 0 < other["peak_bytes"] <= 2**30
    assert line.values["branches"] == alone.values["branches"] == 2
    assert line.text.endswith("on this machine with 2 cards")


def test_the_device_that_is_chosen_is_planned_for(
    graph: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenimage_lowvram.nodes import devices

    looked_at: list[torch.device] = []
    monkeypatch.setattr(devices, "_accelerators", lambda: ["cpu", "cpu:0"])
    monkeypatch.setattr(devices, "hardware_of", lambda device: looked_at.append(device) or CARD)
    monkeypatch.setattr(live_plan, "could_be_free", lambda device: (2**30 * (1 + (device.index == 0)), 2**32))
    limits = [lines_of(graph(transformer_device=chosen))[0].values["limit_bytes"] for chosen in ("auto", "cpu:0")]
    assert limits == [2**30, 2**31]
    assert torch.device("cpu:0") in looked_at  # the other one may have been opened before
    (line,) = lines_of(graph(transformer_device="cuda:7"))
    assert (line.fits, line.values["code"]) == (False, "value.wrong")


def test_a_run_that_does_not_fit_is_told_with_the_way_out(graph: Callable[..., dict[str, Any]]) -> None:
    (line,) = lines_of(graph(width=4096, vram_limit_gb=0.001, ram_limit_gb=4.0))
    assert not line.fits
    assert "vram_limit_gb" in line.text or "limit" in line.text
    assert line.values["code"] == "plan.sampling_does_not_fit"  # what a page in another language says it by
    assert line.values["text"] == line.text


def test_a_file_that_is_not_there_is_told_by_its_code(graph: Callable[..., dict[str, Any]]) -> None:
    (line,) = lines_of(graph(transformer="gone.safetensors"))
    assert not line.fits
    assert "gone.safetensors" in line.text
    assert line.values["code"]


def test_what_is_not_known_is_said(graph: Callable[..., dict[str, Any]]) -> None:
    prompt = graph(ram_limit_gb=4.0, vram_limit_gb=2.0)
    prompt["3"] = {"class_type": "SomebodysLatent", "inputs": {}}
    prompt["5"] = {"class_type": "ControlNetLoader", "inputs": {}}
    prompt["6"] = {"class_type": "ControlNetApply", "inputs": {"conditioning": ["2", 0], "control_net": ["5", 0]}}
    prompt["4"]["inputs"]["positive"] = ["6", 0]
    (line,) = lines_of(prompt)
    assert "ControlNet not counted" in line.text
    assert "for 1328x1328" in line.text


def test_a_controlnet_and_a_patch_are_counted_by_their_files(
    graph: Callable[..., dict[str, Any]], models: Callable[[str, Path], None], small_pipeline: Path, tmp_path: Path
) -> None:
    for kind in ("controlnet", "model_patches"):
        (tmp_path / kind).mkdir()
        models(kind, tmp_path / kind)
    transformer = small_pipeline / "transformer"
    net = write_instantx(tmp_path / "controlnet" / "planned_net.safetensors", transformer, layers=2)
    patch = write_diffsynth(tmp_path / "model_patches" / "planned_patch.safetensors", transformer)
    shutil.copy(patch, net.with_name("planned_other.safetensors"))
    prompt = graph(ram_limit_gb=4.0, vram_limit_gb=2.0)
    plain = lines_of(prompt)[0].values

    def line_with(name: str) -> PlanLine:
        prompt["5"] = {"class_type": "ControlNetLoader", "inputs": {"control_net_name": name}}
        ends = {"positive": ["2", 0], "negative": ["2", 1], "control_net": ["5", 0], "strength": 1.0}
        prompt["6"] = {"class_type": "ControlNetApplyAdvanced", "inputs": ends}
        prompt["7"] = {"class_type": "ModelPatchLoader", "inputs": {"name": patch.name}}
        inputs = {"model": ["1", 0], "model_patch": ["7", 0]}
        prompt["8"] = {"class_type": "QwenImageDiffsynthControlnet", "inputs": inputs}
        prompt["4"]["inputs"] |= {"model": ["8", 0], "positive": ["6", 0], "negative": ["6", 1]}
        (line,) = lines_of(prompt)
        return line

    controlled = line_with(net.name)
    assert "not counted" not in controlled.text
    weights = sum(tensor.nbytes for file in (net, patch) for tensor in load_file(file).values())
    assert controlled.values["peak_bytes"] > plain["weights_bytes"] + weights
    (net.parent / "planned_old.pth").write_bytes(b"")
    assert "ControlNet not counted" in line_with("planned_old.pth").text
    for wrong, code in (
        ("planned_gone.safetensors", "choice.missing"),
        ("planned_other.safetensors", "control.other_model"),
    ):
        refused = line_with(wrong)
        assert (refused.fits, refused.values["code"]) == (False, code)


@pytest.mark.parametrize("kind", ["QwenLowVRAMLoadLora", "LoraLoaderModelOnly"])
def test_a_lora_is_counted_or_said_not_to_be(
    graph: Callable[..., dict[str, Any]], models: Callable[[str, Path], None], kind: str, tmp_path: Path
) -> None:
    layers = {f"transformer_blocks.{i}.attn.to_q": (64, 64) for i in range(4)}
    parts = {name: make_parts("lora", shape, rank=16) for name, shape in layers.items()}
    write_lora(tmp_path / "counted.safetensors", parts)
    write_lora(tmp_path / "others.safetensors", {"of_another_model": make_parts("lora", (8, 8))})
    oft = {"diffusion_model.transformer_blocks.0.attn.to_q.oft_blocks": torch.zeros(8, 8, 8)}
    save_file(oft, tmp_path / "oft.safetensors")
    models("loras", tmp_path)

    def prompt_with(*names: str, strength: float = 1.0) -> dict[str, Any]:
        prompt = graph(ram_limit_gb=4.0, vram_limit_gb=2.0)
        for number, name in enumerate(names):
            before = prompt["4"]["inputs"]["model"]
            inputs = {"model": before, "lora_name": name, "strength": strength, "strength_model": strength}
            prompt[f"lora {number}"] = {"class_type": kind, "inputs": inputs}
            prompt["4"]["inputs"]["model"] = [f"lora {number}", 0]
        return prompt

    def line_with(*names: str) -> PlanLine:
        (line,) = lines_of(prompt_with(*names))
        return line

    def stored_bytes(*names: str, **options: float) -> int:
        (run,) = runs_of(prompt_with(*names, **options), live_plan.image_size)
        (version,) = live_plan._models_of(run, live_plan._loras_of(run)).versions.values()
        return version.footprint.stored_bytes

    plain, counted = stored_bytes(), stored_bytes("counted.safetensors")
    assert counted - plain == pytest.approx(4 * 2 * 64 * 16, abs=512)  # fp32, of one layer in each block
    assert stored_bytes("counted.safetensors", "counted.safetensors") > counted
    assert stored_bytes("counted.safetensors", strength=0.0) == plain
    assert stored_bytes("oft.safetensors", "counted.safetensors") == counted
    assert "not counted" not in line_with("counted.safetensors").text
    assert "LoRA not counted" in line_with("oft.safetensors", "counted.safetensors").text
    for wrong, code in (("gone.safetensors", "choice.missing"), ("others.safetensors", "lora.other_model")):
        refused = line_with(wrong)
        assert (refused.fits, refused.values["code"]) == (False, code)


def test_another_size_or_limit_opens_no_file_again(
    graph: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    plan = live_plan.PlannedModels.open
    monkeypatch.setattr(live_plan.PlannedModels, "open", lambda *given: opened.append(given) or plan(*given))
    live_plan._opened.cache_clear()
    small, large = lines_of(graph(vram_limit_gb=1.25)), lines_of(graph(width=128, vram_limit_gb=1.5))
    assert small != large
    assert len(opened) == 1
    lines_of(graph(weight_format="int8"))
    assert len(opened) == 2


def test_only_a_limit_that_a_person_set_refuses_before_the_run(graph: Callable[..., dict[str, Any]]) -> None:
    def refusal(**settings: Any) -> DoesNotFit | None:
        (run,) = runs_of(graph(**settings), live_plan.image_size)
        return refusal_of(run)

    assert refusal(vram_limit_gb=1.0) is None
    assert refusal(vram_limit_gb=0.0, width=4096) is None
    assert refusal(vram_limit_gb=0.001, width=4096)


@pytest.mark.parametrize("node", ["2", "3"])
def test_encoding_for_a_run_that_cannot_fit_is_refused_at_that_node_alone(
    graph: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    monkeypatch.setattr(live_plan, "executing_node_id", lambda: node)
    refuse_what_cannot_run(graph(vram_limit_gb=1.0))
    too_large = graph(vram_limit_gb=0.001, width=4096)
    if node == "2":
        with pytest.raises(DoesNotFit, match="its prompt is not encoded"):
            refuse_what_cannot_run(too_large)
        too_large["5"] = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 16, "height": 16, "batch_size": 1}}
        too_large["6"] = {**too_large["4"], "inputs": too_large["4"]["inputs"] | {"latent_image": ["7", 0]}}
    refuse_what_cannot_run(too_large)  # another sampler behind it may fit, or the node encodes nothing
    refuse_what_cannot_run(None)


def test_a_widget_that_is_linked_has_the_value_of_its_primitive(graph: Callable[..., dict[str, Any]]) -> None:
    prompt = graph(vram_limit_gb=["9", 0], ram_limit_gb=["8", 0])
    prompt["9"] = {"class_type": "PrimitiveFloat", "inputs": {"value": 1.5}}
    (line,) = lines_of(prompt)  # and what nothing tells is as if it were not set
    assert line.values["limit_bytes"] == 3 * 2**29
    assert lines_of(graph(transformer=["9", 0])) == []


def test_the_loaders_variant_is_planned_with(graph: Callable[..., dict[str, Any]]) -> None:
    (line,) = lines_of(graph(variant="Qwen-Image-2.1"))
    assert line.values["code"] == "choice.variant_of_another_family"


def test_a_step_cache_for_other_steps_is_told(graph: Callable[..., dict[str, Any]]) -> None:
    (line,) = lines_of(graph(step_cache="planned_20"))
    assert line.values["code"] == "plan.steps_of_other_table"


def test_settings_that_are_none_are_told(graph: Callable[..., dict[str, Any]]) -> None:
    (run,) = runs_of(graph(compute="quickly"), live_plan.image_size)
    line: PlanLine = line_of(run)
    assert not line.fits
