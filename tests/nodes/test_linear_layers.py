"""What the loader's `compute` chooses, and what a person is told where nothing is computed on stored weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfy_files import note_bytes
from qwenimage_lowvram.engine.compute import linear_choice, product_trials
from qwenimage_lowvram.engine.compute.eight_bit_products import Int8Product
from qwenimage_lowvram.engine.compute.linear_choice import DECODED, Computing, LinearChoice
from qwenimage_lowvram.engine.compute.product_trials import TRIALS
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.nodes.adapters.linear_layers import linear_of_loader, nothing_as_stored
from safetensors.torch import save_file

CPU = Hardware.detect(torch.device("cpu"))
CARD = replace(CPU, host_device=False)
INT8_NOTE = "int8_tensorwise"


def a_file(folder: Path, dtype: torch.dtype, *, scaled: bool = True) -> Checkpoint:
    """As ComfyUI has it; unscaled: a plain cast."""
    tensors = {"layer.weight": torch.zeros(4, 4, dtype=dtype)}
    if dtype is torch.int8:
        tensors |= {"layer.weight_scale": torch.ones(4, 1), "layer.comfy_quant": note_bytes({"format": INT8_NOTE})}
    elif scaled and dtype is torch.float8_e4m3fn:
        tensors["layer.scale_weight"] = torch.ones(())
    save_file(tensors, folder / "m.safetensors")
    return open_checkpoint(folder / "m.safetensors")


def chosen(
    computing: Computing, file: Checkpoint, hardware: Hardware = CARD, *, as_stored: bool = True
) -> tuple[LinearChoice, str]:
    return linear_of_loader(computing, file, [hardware], torch.bfloat16, as_stored=as_stored)


def test_auto_follows_comfyui_on_a_card_for_a_persons_own_int8_file_alone(tmp_path: Path) -> None:
    file = a_file(tmp_path, torch.int8)
    followed, told = chosen(Computing.AS_COMFYUI, file)
    assert (followed.backends, told) == ({"int8": "eager"}, "")
    assert chosen(Computing.AS_COMFYUI, file, CPU) == (DECODED, "")
    assert chosen(Computing.AS_COMFYUI, file, as_stored=False) == (DECODED, "")
    assert chosen(Computing.EXACT, file) == (DECODED, "")
    assert chosen(Computing.FAST, file, CPU, as_stored=False)[0].backends == {"int8": "eager"}


def test_auto_says_nothing_of_files_without_int8_and_fast_does(tmp_path: Path) -> None:
    file = a_file(tmp_path, torch.bfloat16)
    assert chosen(Computing.AS_COMFYUI, file)[1] == ""
    assert "exactly" in (told := chosen(Computing.FAST, file)[1])
    assert "no weights in the file can be multiplied as stored (int8, fp8, w4a4, w4a8" in told


@pytest.mark.parametrize("computing", [Computing.AS_COMFYUI, Computing.FAST])
def test_what_a_file_has_no_use_for_is_neither_tried_nor_told(
    computing: Computing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ImportError("No module named 'comfy_kitchen'")

    monkeypatch.setattr(product_trials, "load_fp8", missing)
    monkeypatch.setattr(linear_choice, "TRIALS", tuple(replace(t, comfyui_does=lambda _: True) for t in TRIALS))
    assert "comfy-kitchen" in chosen(computing, a_file(tmp_path, torch.float8_e4m3fn))[1]
    plain, told = chosen(computing, a_file(tmp_path, torch.float8_e4m3fn, scaled=False))
    assert not plain.backends
    assert "comfy-kitchen" not in told
    assert bool(told) == (computing is Computing.FAST)  # who asked for products is told that there are none


@pytest.mark.parametrize("computing", [Computing.AS_COMFYUI, Computing.FAST])
def test_a_missing_package_and_a_card_that_cannot_are_named(
    computing: Computing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = a_file(tmp_path, torch.int8)

    def broken(*args: object) -> None:
        raise RuntimeError("no kernel image is available")

    with monkeypatch.context() as change:
        change.setattr(Int8Product, "__call__", broken)
        linear, told = chosen(computing, file)
    assert not linear.backends
    assert "do not work on 'cpu' (no kernel image is available)" in told

    def missing() -> None:
        raise ImportError("No module named 'comfy_kitchen'")

    monkeypatch.setattr(product_trials, "load_int8", missing)
    linear, told = chosen(computing, file)
    assert not linear.backends
    assert "comfy-kitchen is missing or too old" in told


def test_a_product_that_computes_wrong_numbers_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Int8Product.__call__
    monkeypatch.setattr(Int8Product, "__call__", lambda *args: 1.2 * right(*args))
    linear, told = chosen(Computing.FAST, a_file(tmp_path, torch.int8))
    assert not linear.backends
    assert "int8 products are wrong on 'cpu'" in told


def test_fast_names_formats_that_have_no_product() -> None:
    class Transformer:
        stored_product = None
        weight_format = "q4_k"

    told = nothing_as_stored(LinearChoice(Computing.FAST, {"int8": "eager"}), Transformer())  # type: ignore[arg-type]
    assert "weights in q4_k cannot be multiplied as stored" in told
    assert not nothing_as_stored(LinearChoice(Computing.AS_COMFYUI, {"int8": "eager"}), Transformer())  # type: ignore[arg-type]
