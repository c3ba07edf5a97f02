"""Attention as ComfyUI's nodes, switches and files ask for it: called as plain kernels, named, never ignored."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.compute.attention_kernels import FUSED
from qwenimage_lowvram.engine.errors import Unsupported
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from safetensors.torch import save_file
from torch import Tensor

from .conftest import cond, empty_latent
from .test_model import ksampler
from .test_switches import given  # noqa: F401  # a fixture

CPU = Hardware.detect(torch.device("cpu"))


def with_override(model: Any, override: Callable[..., Tensor]) -> Any:
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


def run(model: Any) -> Tensor:
    samples: Tensor = ksampler(model, cond(9), cond(5, 2), empty_latent())
    return samples


def test_a_nodes_override_computes_the_attention_of_every_block(model: Any) -> None:
    expected, seen = run(model), list[tuple[Any, ...]]()

    def override(function: Any, query: Tensor, key: Tensor, value: Tensor, heads: int, **options: Any) -> Tensor:
        seen.append((tuple(query.shape), heads, options["skip_reshape"]))
        out: Tensor = function(query, key, value, heads, **options)
        return out

    assert torch.equal(run(with_override(model, override)), expected)
    report = model.model.last_report
    assert len(seen) == 2 * report.passes * report.plan.blocks
    assert {heads for _, heads, _ in seen} == {seen[0][0][1]}
    assert "override (not exact)" in str(report.plan)
    assert torch.equal(run(model), expected)  # nothing of it is left
    assert model.model.last_report.plan.attention == FUSED.name


def test_comfyuis_own_attention_functions_work_as_overrides(model: Any) -> None:
    from comfy.ldm.modules.attention import attention_pytorch, attention_split

    expected = run(model)
    for function in (attention_pytorch, attention_split):

        def override(original: Any, *args: Any, function: Any = function, **options: Any) -> Tensor:
            out: Tensor = function(*args, **options)
            return out

        out = run(with_override(model, override))
        assert (out - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_masked_prompt_reaches_the_override(model: Any) -> None:
    masked, masks = cond(9, attention_mask=torch.tensor([[1] * 6 + [0] * 3])), list[Any]()
    expected = ksampler(model, masked, cond(5, 2), empty_latent())

    def override(function: Any, *args: Any, **options: Any) -> Tensor:
        masks.append(options["mask"])
        out: Tensor = function(*args, **options)
        return out

    assert torch.equal(ksampler(with_override(model, override), masked, cond(5, 2), empty_latent()), expected)
    assert any(mask is not None for mask in masks)


def test_numbers_that_are_not_finite_are_computed_again_by_torch(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected = run(model)

    def broken(function: Any, *args: Any, **options: Any) -> Tensor:
        out: Tensor = function(*args, **options)
        return out * float("nan")

    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(with_override(model, broken)), expected)
    assert "broken made numbers that are not finite" in model.model.last_report.attention_notes
    assert "not finite" in caplog.text


def test_an_override_that_a_hook_sets_for_a_part_of_the_run_is_refused(model: Any) -> None:
    clone = with_override(model, lambda function, *args, **options: function(*args, **options))

    def wrapper(apply: Any, args: Any) -> Tensor:
        options = args["c"]["transformer_options"]
        changed = args["c"] | {"transformer_options": options | {"optimized_attention_override": print}}
        out: Tensor = apply(args["input"], args["timestep"], **changed)
        return out

    clone.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(Unsupported, match="override for part of the run"):
        run(clone)


@pytest.mark.parametrize(
    ("switches", "kernel"),
    [
        ({}, "auto"),
        ({"use_sage_attention": True}, "sage"),
        ({"use_flash_attention": True}, "flash"),
        ({"use_ck_attention": True}, "comfy_kitchen_int8"),
        ({"use_split_cross_attention": True}, "split"),
        ({"use_quad_cross_attention": True}, "split"),
    ],
)
def test_auto_is_what_comfyui_was_started_with(given: Any, switches: dict[str, bool], kernel: str) -> None:  # noqa: F811
    from qwenimage_lowvram.nodes.adapters.switches import attention

    given(**switches)
    assert attention() == kernel


def chosen(choice: str, file: Path) -> tuple[str, str]:
    from qwenimage_lowvram.nodes.adapters.attention import attention_of_loader

    attention, told = attention_of_loader(choice, open_checkpoint(file), [CPU], torch.float32)
    return attention.kernel.name, told


@pytest.mark.parametrize(
    ("wish", "kernel", "words"),
    [
        ("pytorch", "pytorch", ""),
        ("sub_quad", "split", ""),
        ("comfy_kitchen_int8", "pytorch", "quantizes"),
        ("another_one", "pytorch", "not known here"),
    ],
)
def test_a_kernel_that_a_file_asks_for_is_followed_or_said(wish: str, kernel: str, words: str, tmp_path: Path) -> None:
    note = torch.tensor(list(f'{{"attention": "{wish}"}}'.encode()), dtype=torch.uint8)
    save_file({"weight": torch.zeros(1), "comfy_attention.config": note}, tmp_path / "m.safetensors")
    name, told = chosen("auto", tmp_path / "m.safetensors")
    assert name == kernel
    assert words in told if words else told == ""
    assert chosen("pytorch", tmp_path / "m.safetensors") == ("pytorch", "")


def test_the_loader_refuses_a_kernel_that_does_not_work_here(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(Unsupported, match="CUDA"):
        chosen("flash", tmp_path / "m.safetensors")
