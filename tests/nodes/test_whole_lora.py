"""OFT, BOFT and GLoRA: through our node and ComfyUI's loaders, the image of weights that ComfyUI's adapters changed."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.errors import DamagedFile, Unsupported, WrongModel
from qwenimage_lowvram.engine.lora.deltas import scratch_elements
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.request import SamplingRequest
from safetensors.torch import load_file, save_file
from torch import Tensor

from .test_lora import close, model_of, run

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.2.img_mlp.net.0.proj", "transformer_blocks.3.img_mod.1",
          "transformer_blocks.1.attn.add_k_proj", "img_in")  # fmt: skip
Write = Callable[..., Path]


def parts_of(kind: str, shape: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """As LyCORIS names and shapes them."""
    rows, columns = shape

    def random(*size: int, scale: float = 0.1) -> Tensor:
        return torch.randn(*size, generator=generator) * scale

    if kind.startswith("OFT"):
        return {"oft_blocks": random(rows // 8, 8, 8)} | ({"alpha": torch.tensor(0.3)} if "constraint" in kind else {})
    if kind == "BOFT":
        return {"oft_blocks": random(2, rows // 8, 8, 8), "alpha": torch.tensor(0.0), "rescale": 1 + random(rows, 1)}
    a, b = random(columns, 4), random(4, columns, scale=1.0)
    return {
        "a1.weight": a,
        "a2.weight": b,
        "b1.weight": random(rows, 4),
        "b2.weight": b.flip(0),
        "alpha": torch.tensor(2.0),
    }


KINDS = ("OFT", "OFT with constraint", "BOFT", "GLoRA")


@pytest.fixture(scope="module")
def folder(small_pipeline: Path) -> Path:
    return small_pipeline / "transformer"


@pytest.fixture
def write(folder: Path, models: Any, tmp_path: Path) -> Write:
    """Write a file of a kind into a folder of models/loras, with a plain LoRA of one layer more."""
    with torch.inference_mode(False):
        weights = load_file(next(folder.glob("*.safetensors")))
    (tmp_path / "loras").mkdir()
    models("loras", str(tmp_path / "loras"))

    def write_kind(kind: str, prefix: str = "lycoris_", **changed: Tensor) -> Path:
        generator = torch.Generator().manual_seed(0)
        tensors = {"lora_te_other.oft_blocks": torch.zeros(2, 2, 2)}
        for layer in LAYERS:
            name = layer.replace(".", "_") if prefix.endswith("_") else layer
            shape = tuple(weights[f"{layer}.weight"].shape)
            tensors |= {f"{prefix}{name}.{part}": v for part, v in (parts_of(kind, shape, generator) | changed).items()}
        plain = "transformer_blocks.3.attn.to_q"
        plain_name = plain.replace(".", "_") if prefix.endswith("_") else plain
        tensors[f"{prefix}{plain_name}.lora_up.weight"] = torch.randn(64, 4, generator=generator)
        tensors[f"{prefix}{plain_name}.lora_down.weight"] = torch.randn(4, 64, generator=generator) / 8
        file = tmp_path / "loras" / "m.safetensors"
        save_file({key: value.clone() for key, value in tensors.items()}, file)
        return file

    return write_kind


def merged(folder: Path, target: Path, file: Path, strength: float) -> Path:
    """The transformer as ComfyUI's own code changes its weights in fp32, as a folder."""
    import comfy.lora

    with torch.inference_mode(False), torch.no_grad():
        model = QwenImageTransformer2DModel.from_pretrained(folder)
        weights = dict(model.named_parameters())
        to_load = {f"lycoris_{name.removesuffix('.weight').replace('.', '_')}": name for name in weights}
        patches = comfy.lora.load_lora(load_file(file), to_load, log_missing=False)
        for name, patch in patches.items():
            changed = comfy.lora.calculate_weight(
                [(strength, patch, 1.0, None, None)], weights[name].data.clone(), name
            )
            weights[name].data = changed
        model.save_pretrained(target)
    return target


def by_our_node(model: Any, file: Path, strength: float) -> tuple[Any, str]:
    from qwenimage_lowvram.nodes.lora import QwenLowVRAMLoadLora

    patched, report = QwenLowVRAMLoadLora().load(model, file.name, strength)["result"]
    return patched, report


def by_comfyuis_node(model: Any, file: Path, strength: float) -> Any:
    import comfy.sd
    import comfy.utils

    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(file)), strength, 0)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streamed", [False, True])
def test_the_image_is_that_of_weights_that_comfyuis_adapters_changed(
    streamed: bool, kind: str, model: Any, folder: Path, write: Write, tmp_path: Path
) -> None:
    plain, file = run(model), write(kind)
    ours, report = by_our_node(model, file, 0.7)
    if streamed:
        run(ours)
        least = least_bytes(model.model.transformer.footprint, SamplingRequest(96, 64, 2, 9))
        model.model.limit_bytes = int(1.1 * least)
    image = run(ours)
    plan = model.model.last_report.plan
    assert (len(plan.resident) < plan.blocks) == streamed
    assert plan.peak_bytes <= plan.limit_bytes
    expected = run(model_of(merged(folder, tmp_path / "merged", file, 0.7)))
    assert close(image, expected)
    assert not close(image, plain)
    counts = re.match(r"(\d+) of (\d+) keys of .* are used; they change 6 weights\.", report)
    assert counts is not None
    assert int(counts[2]) - int(counts[1]) == 1
    assert "lora_te_other.oft_blocks" in report
    assert torch.equal(run(by_comfyuis_node(model, file, 0.7)), image)
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_written_over_after_it_was_read_changes_no_image(kind: str, model: Any, write: Write) -> None:
    file = write(kind)
    expected = run(by_our_node(model, file, 1.0)[0])
    run(model)  # nothing of the LoRA is left in the blocks
    ours, _ = by_our_node(model, file, 1.0)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as stream:
        stream.seek(header)
        stream.write(bytes(file.stat().st_size - header))
    assert torch.equal(run(ours), expected)


def test_a_file_that_changes_while_comfyui_reads_it_is_refused(
    model: Any, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.utils

    file, read = write("OFT"), comfy.utils.load_torch_file

    def change_and_read(*args: Any, **options: Any) -> Any:
        os.utime(file, (1, 1))
        return read(*args, **options)

    monkeypatch.setattr(comfy.utils, "load_torch_file", change_and_read)
    with pytest.raises(DamagedFile, match="was changed after it was opened"):
        by_our_node(model, file, 1.0)


def test_the_plan_counts_what_the_adapters_hold(model: Any, write: Write) -> None:
    before = model.model.transformer.footprint
    ours, _ = by_our_node(model, write("OFT"), 1.0)
    run(ours)
    after = model.model.transformer.footprint
    ((lora, _),) = ours.loras
    held = {
        name: delta.allocated_bytes + 4 * scratch_elements(delta.shape, [delta]) for name, delta in lora.deltas.items()
    }
    assert before.scratch_bytes == before.modulation_scratch_bytes == 0
    assert after.scratch_bytes == held["transformer_blocks.2.img_mlp.net.0.proj.weight"]
    assert after.modulation_scratch_bytes == held["transformer_blocks.3.img_mod.1.weight"]


@pytest.mark.parametrize("shape", [(64, 48), (768, 512)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_holds_no_more_than_it_says(kind: str, shape: tuple[int, int], comfy: Any) -> None:
    import comfy.lora
    from qwenimage_lowvram.nodes.adapters.whole_lora import match_patches

    tensors = {f"x.{name}": part for name, part in parts_of(kind, shape, torch.Generator().manual_seed(0)).items()}
    patches = comfy.lora.load_lora(tensors, {"x": "diffusion_model.w.weight"})
    (delta,) = match_patches(patches, {"w.weight": shape}).deltas.values()
    parts = [torch.frombuffer(bytearray(p.data or b""), dtype=torch.float32).view(p.shape) for p in delta.parts]
    weight = torch.randn(delta.shape)
    before = weight.clone()
    known = sum(tensor.untyped_storage().nbytes() for tensor in (weight, *parts))
    with LiveBytes("cpu") as live:
        delta.change.change(weight, parts, 0.5)
    assert live.peak - known <= delta.allocated_bytes
    assert not torch.equal(before, weight)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("OFT", {"oft_blocks": torch.zeros(3, 5, 5)}),
        ("BOFT", {"oft_blocks": torch.zeros(9, 8, 8, 8)}),
        ("GLoRA", {"a1.weight": torch.zeros(5, 4)}),
    ],
)
def test_what_does_not_fit_is_refused_and_not_left_out_as_comfyui_does(
    kind: str, changed: dict[str, Tensor], model: Any, write: Write
) -> None:
    file = write(kind, **changed)
    for load in (by_our_node, by_comfyuis_node):
        with pytest.raises(WrongModel, match=rf"ComfyUI's {kind} adapter does not fit .*Choose a LoRA for Qwen-Image"):
            load(model, file, 1.0)


def test_a_form_that_comfyui_does_not_read_is_refused_by_name(model: Any, models: Any, tmp_path: Path) -> None:
    models("loras", str(tmp_path))
    save_file({f"transformer.{LAYERS[0]}.oft_R.weight": torch.zeros(8, 28)}, tmp_path / "peft.safetensors")
    with pytest.raises(Unsupported, match="holds OFT or BOFT"):
        by_our_node(model, tmp_path / "peft.safetensors", 1.0)


def test_it_stacks_with_other_loras_in_their_order(model: Any, folder: Path, write: Write, tmp_path: Path) -> None:
    file = write("GLoRA")
    once = merged(folder, tmp_path / "once", file, 0.7)
    twice = merged(once, tmp_path / "twice", file, -0.4)
    patched, _ = by_our_node(by_our_node(model, file, 0.7)[0], file, -0.4)
    assert close(run(patched), run(model_of(twice)))
