"""Kernels of attention: which is taken, which is refused and why, and what is done where one fails.

The packages are stand-ins with the interfaces that their makers document: they show the choice and the call, not the
kernel.
"""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.compute import attention_choice, attention_packages
from qwenimage_lowvram.engine.compute.attention import Attention, attention_by
from qwenimage_lowvram.engine.compute.attention_choice import AUTO, CHOICES, choose_attention, trial_key
from qwenimage_lowvram.engine.compute.attention_kernels import FUSED, SCORES, AttentionShape
from qwenimage_lowvram.engine.compute.attention_packages import ANY_DEVICE, FUNCTIONS
from qwenimage_lowvram.engine.errors import Unsupported
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.runs.known_trials import KnownTrials
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

CPU = Hardware.detect(torch.device("cpu"))
# the same functions, as if they ran on a CPU
HERE = {name: replace(function, devices=ANY_DEVICE) for name, function in FUNCTIONS.items()}
OTHERS = ("flash", "xformers", "sage", "comfy_kitchen_int8")


class Package(ModuleType):
    """Stands in for each of the packages. error: what its results are moved by."""

    def __init__(self, name: str, error: float = 0.0) -> None:
        super().__init__(name)
        self.calls: list[tuple[int, ...]] = []
        self.error = error

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None = None) -> Tensor:
        self.calls.append(tuple(q.shape))
        return scaled_dot_product_attention(q, k, v, mask, scale=scale) * (1 + self.error)

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: Any = None
    ) -> Tensor:
        return self._attend(*(part.transpose(1, 2) for part in (q, k, v)), softmax_scale).transpose(1, 2)

    def memory_efficient_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None
    ) -> Tensor:
        return self._attend(*(part.transpose(1, 2) for part in (query, key, value)), scale).transpose(1, 2)

    def sageattn(
        self, q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False, sm_scale: Any = None
    ) -> Tensor:
        assert tensor_layout == "HND"
        return self._attend(q, k, v, sm_scale)

    def int8_attention(self, q: Tensor, k: Tensor, v: Tensor, *, scale: Any = None, attn_mask: Any = None) -> Tensor:
        return self._attend(q, k, v, scale, attn_mask)

    def int8_attention_is_available(self, device: torch.device | None = None) -> bool:
        return True


Installed = Callable[..., Package]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """`installed(kernel)` puts a stand-in where the kernel's package is imported from."""

    def put(name: str, error: float = 0.0) -> Package:
        package = Package(HERE[name].module, error)
        monkeypatch.setitem(sys.modules, HERE[name].module.partition(".")[0], package)
        monkeypatch.setitem(sys.modules, HERE[name].module, package)
        return package

    return put


def choose(name: str, *, dtype: torch.dtype = torch.bfloat16, tried: Any = None, **options: Any) -> Attention:
    return choose_attention(name, [CPU], dtype, tried={} if tried is None else tried, **{"functions": HERE, **options})


def operands(queries: int = 70, *, images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, 3, queries, 128, generator=generator).bfloat16() for _ in range(3)]


def refusal(name: str, **options: Any) -> str:
    with pytest.raises(Unsupported) as error:
        choose(name, **options)
    assert error.value.code == "attention.unavailable"
    assert error.value.values["kernel"] == name
    return str(error.value)


def test_what_can_be_chosen_does_not_depend_on_what_is_installed() -> None:
    assert CHOICES == (AUTO, "pytorch", "split", "flash", "xformers", "sage", "comfy_kitchen_int8")
    assert set(CHOICES) - {AUTO} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", OTHERS)
def test_a_chosen_kernel_computes_what_torchs_does(name: str, installed: Installed) -> None:
    package = installed(name)
    attention = choose(name)
    package.calls.clear()
    with attention_by(attention):
        out = scaled_dot_product_attention(*operands(), scale=0.1)
    assert package.calls == [(2, 3, 70, 128)]
    assert torch.equal(out, scaled_dot_product_attention(*operands(), scale=0.1))
    assert attention.kernel.exact == (name in ("flash", "xformers"))
    assert ("not exact" in attention.kernel.text(AttentionShape(70, 70, 3, 128))) != attention.kernel.exact


@pytest.mark.parametrize("name", OTHERS)
def test_a_kernel_whose_package_is_missing_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, HERE[name].module.partition(".")[0], None)
    monkeypatch.setitem(sys.modules, HERE[name].module, None)
    assert HERE[name].package in refusal(name)


def test_a_kernel_for_other_devices_is_refused_before_it_is_imported() -> None:
    assert "CUDA" in refusal("flash", functions=FUNCTIONS)


def test_a_package_that_fails_while_it_is_imported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sageattention.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "libcudart" in refusal("sage")


def test_an_older_package_without_the_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy_kitchen", ModuleType("comfy_kitchen"))
    assert "no such kernel" in refusal("comfy_kitchen_int8")


@pytest.mark.parametrize(("name", "error"), [("flash", 0.05), ("sage", 0.2), ("sage", float("nan"))])
def test_a_kernel_with_wrong_results_is_refused(name: str, error: float, installed: Installed) -> None:
    installed(name, error)
    assert "wrong" in refusal(name)


def test_a_kernel_that_quantizes_may_be_less_exact(installed: Installed) -> None:
    installed("sage", 0.05)
    assert not choose("sage").kernel.exact


def test_a_kernel_that_fails_is_refused(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(installed("sage"), "sageattn", fail, raising=False)
    assert "ended with an error" in refusal("sage")


def test_memory_that_runs_out_tells_nothing_of_a_kernel(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(installed("sage"), "sageattn", fail, raising=False)
    tried: dict[str, float] = {}
    with pytest.raises(torch.OutOfMemoryError):
        choose("sage", tried=tried)
    assert tried == {}


def test_a_kernel_is_tried_once_on_a_machine(installed: Installed, tmp_path: Path) -> None:
    package = installed("flash")
    choose("flash", tried=KnownTrials(tmp_path / "attention.json"))
    assert package.calls
    package.calls.clear()
    choose("flash", tried=KnownTrials(tmp_path / "attention.json"))
    assert package.calls == []
    (key,) = set(json.loads((tmp_path / "attention.json").read_text())) - {"version"}
    assert "flash-attn" in key
    assert torch.__version__ in key
    choose("flash", dtype=torch.float16, tried=KnownTrials(tmp_path / "attention.json"))
    assert package.calls


def test_what_is_remembered_is_of_package_torch_driver_card_and_dtype(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("sage")
    card, facts = torch.device("cuda"), {"card": "RTX 3060", "driver": "580.65"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: facts["card"])
    monkeypatch.setattr(attention_choice, "driver_of", lambda device: facts["driver"])
    monkeypatch.setattr(attention_packages, "version", lambda package: facts.get("package", "2.2.0"))

    def key(dtype: torch.dtype = torch.bfloat16, **changed: str) -> str:
        before = dict(facts)
        facts.update(changed)
        made = trial_key(FUNCTIONS["sage"], card, dtype)
        facts.clear()
        facts.update(before)
        return made

    keys = [key(), key(package="2.2.1"), key(driver="580.88"), key(card="RTX 4060"), key(torch.float16)]
    monkeypatch.setattr(torch, "__version__", "3.0")
    assert len({*keys, key()}) == 6


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 0, "a": 1}', '{"version": 1, "a": "b"}'])
def test_what_is_remembered_and_broken_is_tried_again(content: str, tmp_path: Path) -> None:
    (tmp_path / "attention.json").write_text(content)
    tried = KnownTrials(tmp_path / "attention.json")
    assert dict(tried) == {}
    tried["a"] = 0.5
    assert dict(KnownTrials(tmp_path / "attention.json")) == {"a": 0.5}


def test_auto_is_torchs_own() -> None:
    assert choose(AUTO) == Attention(FUSED)
    without = replace(CPU, fused_attention=frozenset())
    assert choose_attention(AUTO, [CPU, without], torch.bfloat16, tried={}) == Attention(SCORES)


def test_auto_takes_what_was_wished_where_that_works(installed: Installed, caplog: pytest.LogCaptureFixture) -> None:
    installed("flash")
    assert choose(AUTO, wished="flash").kernel.name == "flash"
    with caplog.at_level(logging.WARNING):
        assert choose(AUTO, wished="flash", functions=FUNCTIONS) == Attention(FUSED)
    assert "'flash'" in caplog.text


def test_auto_does_without_a_kernel_of_torchs_that_is_wrong_here(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(module: ModuleType, given: Any) -> Tensor:
        return scaled_dot_product_attention(given.query, given.key, given.value) * 2

    broken = HERE | {name: replace(HERE[name], attend=wrong) for name in ("pytorch", "pytorch flash")}
    broken["pytorch efficient"] = replace(HERE["pytorch efficient"], attend=HERE["split"].attend)
    with caplog.at_level(logging.WARNING):
        assert choose(AUTO, functions=broken).kernel.name == "pytorch efficient"
    assert "results were wrong" in caplog.text


def test_split_attention_makes_scores_as_it_is_planned() -> None:
    class Seen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is scaled_dot_product_attention:
                fused.append(torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled())
            return func(*args, **(kwargs or {}))

    fused: list[bool] = []
    split = choose("split")
    with Seen(), attention_by(split):
        out = scaled_dot_product_attention(*operands())
    assert fused == [False, False]  # scores are counted for one image
    assert (out - scaled_dot_product_attention(*operands())).abs().max() < 0.02


def test_what_a_kernel_lacks_is_computed_by_torch_and_told(installed: Installed) -> None:
    package, told = installed("sage"), list[str]()
    attention = choose("sage")
    package.calls.clear()
    mask = torch.rand(70, 70, generator=torch.Generator().manual_seed(1)) > 0.5
    with attention_by(attention, told=told.append):
        out = scaled_dot_product_attention(*operands(), attn_mask=mask)
    assert package.calls == []
    assert told == ["sage takes no mask"]
    assert torch.equal(out, scaled_dot_product_attention(*operands(), attn_mask=mask))


def test_a_mask_reaches_a_kernel_that_takes_one(installed: Installed) -> None:
    installed("comfy_kitchen_int8")
    mask = torch.rand(70, 70, generator=torch.Generator().manual_seed(1)) > 0.5
    with attention_by(choose("comfy_kitchen_int8"), told=pytest.fail):
        out = scaled_dot_product_attention(*operands(), attn_mask=mask)
    assert torch.equal(out, scaled_dot_product_attention(*operands(), attn_mask=mask))


def test_huge_images_go_through_a_kernel_in_chunks_of_queries(installed: Installed) -> None:
    package, looks = installed("flash"), list[int]()
    attention = choose("flash")
    package.calls.clear()
    with attention_by(attention, 40_000, lambda: looks.append(1)):
        out = scaled_dot_product_attention(*operands(5000, images=1))
    assert [shape[2] for shape in package.calls] == [1666, 1667, 1667]
    assert torch.equal(
        out,
        torch.cat(
            [
                scaled_dot_product_attention(q, *operands(5000, images=1)[1:])
                for q in operands(5000, images=1)[0].split([1666, 1667, 1667], dim=2)
            ],
            dim=2,
        ),
    )


def test_copies_and_what_computes_otherwise_are_planned(installed: Installed) -> None:
    installed("sage")
    shape = AttentionShape(1000, 1000, 24, 128)
    assert choose("sage").kernel.scratch_bytes(shape) == 3 * 3 * 1000 * 24 * 128
    scores = replace(CPU, fused_attention=frozenset())
    kernel = choose_attention("sage", [scores], torch.bfloat16, tried={}, functions=HERE).kernel
    assert kernel.scratch_bytes(shape) == SCORES.scratch_bytes(shape) > 3 * 3 * 1000 * 24 * 128
