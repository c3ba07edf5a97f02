"""ComfyUI's own switches: each is followed, named, or of no matter; and none is new to us."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import QwenLowVRAMError
from qwenimage_lowvram.engine.hardware import Hardware

from .conftest import cond, empty_latent
from .test_model import ksampler

GIB = 1024**3
# of ComfyUI 0.33 to 0.38, where the installed one may not have them
NEWER = (
    "use_ck_attention",
    "disable_fast_disk",
    "disable_nvml_pressure",
    "enable_triton_backend",
    "disable_comfy_compiler",
    "disable_cuda_graphs",
    "assert_graph_breaks",
    "disabled_nodes_config",
    "disable_partner_nodes",
    "offline",
    "disable_assets",
    "date_based_output",
)
HONOURED = (
    "reserve_vram",
    "vram_headroom",
    "disable_pinned_memory",
    "cache_ram",
    "gpu_only",
    "cpu_vae",
    "fp16_vae",
    "bf16_vae",
    "fp32_vae",
    "force_fp32",
    "disable_smart_memory",
    "novram",
    "use_sage_attention",
    "use_flash_attention",
    "use_ck_attention",
    "use_split_cross_attention",
)
NAMED = (
    "force_upcast_attention",
    "force_fp16",
    "fp16_unet",
    "bf16_unet",
    "fast",
)


@pytest.fixture
def given(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`given(name=value)`: as if ComfyUI had been started with that switch."""
    import comfy.cli_args

    def give(**values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(comfy.cli_args.args, name, value, raising=False)

    return give


def test_every_switch_of_comfyui_is_in_the_table(comfy: Any) -> None:
    from comfy.cli_args import parser
    from qwenimage_lowvram.nodes.adapters.switches import SWITCHES, Follow

    names = {action.dest for action in parser._actions}
    assert len(names) > 90
    assert sorted(names - SWITCHES.keys()) == [], "ComfyUI has new switches: follow them, name them, or say why not."
    assert sorted(set(NEWER) - SWITCHES.keys()) == []
    assert all(SWITCHES[name].follow is Follow.HONOURED for name in HONOURED)
    assert all(SWITCHES[name].follow is Follow.NAMED for name in NAMED)
    assert all(len(switch.reason) > 5 for switch in SWITCHES.values())


def test_what_is_not_followed_is_said_once(given: Any, caplog: pytest.LogCaptureFixture) -> None:
    from qwenimage_lowvram.nodes.adapters.switches import tell_unfollowed

    tell_unfollowed()
    assert not caplog.records
    given(force_upcast_attention=True, fast={"fp16_accumulation"}, cpu_vae=True, highvram=True)
    with caplog.at_level(logging.WARNING):
        tell_unfollowed()
    (record,) = caplog.records
    assert "--force-upcast-attention" in record.message
    assert "--fast" in record.message
    assert "are not followed yet" in record.message
    assert "--cpu-vae" not in record.message


def test_a_kernel_that_the_environment_asks_diffusers_for_is_said_not_to_be_followed(
    comfy: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qwenimage_lowvram.nodes.adapters.switches import tell_unfollowed

    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "native")
    tell_unfollowed()
    assert not caplog.records
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "_native_math")
    tell_unfollowed()
    assert "DIFFUSERS_ATTN_BACKEND=_native_math, which is not followed yet" in caplog.text


def test_the_loader_says_what_is_not_followed(given: Any, load: Any, caplog: pytest.LogCaptureFixture) -> None:
    given(force_fp16=True)
    with caplog.at_level(logging.WARNING):
        load()
    assert sum("--force-fp16, which is not followed yet" in record.message for record in caplog.records) == 1


@pytest.fixture
def load(small_pipeline: Path, models: Any) -> Any:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    models("diffusers", str(small_pipeline.parent))
    from qwenimage_lowvram.nodes import model_choices

    def run(**options: Any) -> Any:
        choices = {
            "transformer": f"{small_pipeline.name}{model_choices.FOLDER_MARK}"
            if hasattr(model_choices, "FOLDER_MARK")
            else next(name for name in model_choices.transformer_choices() if small_pipeline.name in name),
            "text_encoder": model_choices.FROM_FOLDER,
            "vae": model_choices.FROM_FOLDER,
            "dtype": "auto",
            "weight_format": "as stored",
            "vram_limit_gb": 0.0,
            "timesteps": "fp32",
        }
        return QwenLowVRAMLoader().load(**{**choices, **options})

    return run


# what stays free on the card


def free_on_card(monkeypatch: pytest.MonkeyPatch, free: int) -> torch.device:
    import comfy.model_management as management

    monkeypatch.setattr(
        management, "get_free_memory", lambda *_, torch_free_too=False: (free, 0) if torch_free_too else free
    )
    monkeypatch.setattr(management, "soft_empty_cache", lambda *_: None)
    return torch.device("meta")


def test_what_comfyui_reserves_stays_free(comfy: Any, monkeypatch: pytest.MonkeyPatch, given: Any) -> None:
    import comfy.model_management as management
    from qwenimage_lowvram.engine.runs.free_memory import HEADROOM_BYTES
    from qwenimage_lowvram.nodes.adapters.limits import could_be_free, stage_bytes

    card = free_on_card(monkeypatch, 8 * GIB)
    default = management.EXTRA_RESERVED_VRAM
    assert default >= HEADROOM_BYTES
    assert stage_bytes(card, None, GIB) == could_be_free(card)[0] == 8 * GIB - default
    monkeypatch.setattr(management, "EXTRA_RESERVED_VRAM", 2.5 * GIB)  # what --reserve-vram 2.5 makes of it
    assert stage_bytes(card, None, GIB) == could_be_free(card)[0] == int(5.5 * GIB)
    given(vram_headroom=0.5)
    assert stage_bytes(card, None, GIB) == could_be_free(card)[0] == 5 * GIB
    monkeypatch.setattr(management, "EXTRA_RESERVED_VRAM", 0.0)
    given(vram_headroom=0)
    assert stage_bytes(card, None, GIB) == 8 * GIB - HEADROOM_BYTES


PROBE = """
import sys, json
sys.argv = ["main.py", *sys.argv[1:]]
import comfy.options; comfy.options.enable_args_parsing()
import comfy.model_management as management
from qwenimage_lowvram.nodes import devices
from qwenimage_lowvram.nodes.adapters import switches
from qwenimage_lowvram.nodes.adapters.limits import headroom_bytes
from qwenimage_lowvram.nodes.dtypes import compute_dtype
import torch
class File: full_precision = False
print(json.dumps({
    "reserved": headroom_bytes(), "pin": switches.may_pin(), "cache": switches.cache_ram_bytes(),
    "dtype": str(compute_dtype("auto", File, torch.device("cuda"))) if "--force-fp32" in sys.argv else "",
    "vae": str(switches.vae_dtype()), "unfollowed": switches.unfollowed(),
    "smart": not management.DISABLE_SMART_MEMORY, "vae_device": str(management.vae_device()),
    "offload": str(management.vae_offload_device()) }))
"""


def started_with(switches: str) -> dict[str, Any]:
    import json

    paths = [*os.environ["PYTHONPATH"].split(os.pathsep), os.path.expanduser(os.environ["COMFYUI_PATH"])]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *switches.split()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=paths[-1],  # not ours: "nodes" is ComfyUI's
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_server_s_command_line_is_followed() -> None:
    found = started_with(
        "--cpu --reserve-vram 1.5 --vram-headroom 0.5 --disable-pinned-memory --cache-ram 20 --bf16-vae --force-fp32 "
        "--disable-smart-memory --cpu-vae --use-split-cross-attention --fast fp16_accumulation --fp8_e5m2-unet"
    )
    assert found == {
        "reserved": 2 * GIB,
        "pin": False,
        "cache": 20 * GIB,
        "dtype": "torch.float32",
        "vae": "torch.bfloat16",
        "unfollowed": ["--fp8_e5m2-unet", "--fast"],
        "smart": False,
        "vae_device": "cpu",
        "offload": "cpu",
    }


# the others


def test_no_memory_is_page_locked_where_that_is_switched_off(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenimage_lowvram.nodes.devices import hardware_of

    card = torch.device("cuda")
    assert hardware_of(card) == Hardware.detect(card)
    assert hardware_of(card).pinned
    given(disable_pinned_memory=True)
    assert not hardware_of(card).pinned
    assert hardware_of(card).pinned_limit_bytes == 0


def test_ram_stays_clear_of_where_comfyui_empties_its_caches(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenimage_lowvram.engine.host_ram import HostRam, RamBound
    from qwenimage_lowvram.engine.runs.free_memory import RAM_HEADROOM_PART
    from qwenimage_lowvram.nodes.adapters import limits

    bounds = [RamBound("the system", 64 * GIB, 60 * GIB)]
    monkeypatch.setattr(HostRam, "now", lambda: HostRam(tuple(bounds)))
    assert limits.free_ram() == 60 * GIB - int(64 * GIB * RAM_HEADROOM_PART)
    given(cache_ram=[1.0])
    assert limits.free_ram() == 60 * GIB - int(64 * GIB * RAM_HEADROOM_PART)
    given(cache_ram=[24.0, 60.0])
    assert limits.free_ram() == 36 * GIB - limits.CACHE_MARGIN_BYTES
    bounds.append(RamBound("a container", 32 * GIB, 20 * GIB))
    assert limits.free_ram() == 20 * GIB - int(32 * GIB * RAM_HEADROOM_PART)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16_vae", torch.float16), ("bf16_vae", torch.bfloat16), ("fp32_vae", torch.float32)]
)
def test_the_vae_s_dtype_is_comfyui_s_where_the_node_says_auto(
    name: str, dtype: torch.dtype, given: Any, load: Any
) -> None:
    given(**{name: True})
    assert load()[2].vae_dtype == dtype
    assert load(dtype="fp32")[2].vae_dtype == torch.float32


def test_force_fp32_makes_auto_fp32(load: Any, comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management as management
    from qwenimage_lowvram.nodes.dtypes import compute_dtype

    monkeypatch.setattr(management, "FORCE_FP32", True)
    file = SimpleNamespace(full_precision=False)
    assert compute_dtype("auto", file, torch.device("cuda")) == torch.float32  # type: ignore[arg-type]


@pytest.mark.parametrize(("faster", "expected"), [(True, torch.float16), (False, torch.float32)])
def test_auto_on_a_card_without_bf16_is_what_is_faster_there(
    faster: bool, expected: torch.dtype, comfy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management
    from qwenimage_lowvram.nodes import dtypes

    monkeypatch.setattr(management, "should_use_bf16", lambda *_, **__: False)
    monkeypatch.setattr(dtypes, "half_products_are_faster", lambda hardware: faster)
    cpu = Hardware.detect(torch.device("cpu"))
    card = replace(cpu, device=torch.device("cuda"))
    file: Any = SimpleNamespace(full_precision=False)
    assert dtypes.transformer_dtype("auto", file, card) == expected
    assert dtypes.transformer_dtype("fp32", file, card) == dtypes.transformer_dtype("auto", file, cpu) == torch.float32
    assert ("differs from the one in fp32" in dtypes.products_text("auto", expected)) == faster
    monkeypatch.setattr(management, "FORCE_FP32", True)
    assert dtypes.transformer_dtype("auto", file, card) == torch.float32


def test_fp16_is_of_the_transformers_products_and_not_of_the_text_encoder(load: Any) -> None:
    model, clip, _ = load(dtype="fp16")
    assert model.model.transformer.products_dtype == torch.float16
    assert model.model_dtype() == model.model.transformer.dtype == torch.float32
    assert model.model.transformer.footprint.in_half
    assert clip.encoder.dtype == torch.float32
    made, expected = (ksampler(m, cond(), cond(5, 2), empty_latent(), steps=2) for m in (model, load(dtype="fp32")[0]))
    assert 0 < (made - expected).abs().max() < 0.02 * expected.abs().max()


def test_cpu_vae_is_where_the_vae_goes(given: Any, load: Any) -> None:
    given(cpu_vae=True)
    assert load()[2].device == torch.device("cpu")


def test_with_novram_the_encoder_stays_on_the_transformer_s_device(given: Any, comfy: Any) -> None:
    from qwenimage_lowvram.nodes.adapters.switches import text_encoder_device

    card = torch.device("cuda:1")
    assert text_encoder_device(card) == torch.device("cpu")
    given(novram=True)
    assert text_encoder_device(card) == card


def test_gpu_only_keeps_encoder_results_and_vae_on_the_card(
    given: Any, comfy: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    given(gpu_only=True)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.HIGH_VRAM)
    card = management.get_torch_device()
    model, clip, vae = load()
    assert clip.encoder.hardware.device == vae.output_device == vae.patcher.offload_device == card
    assert model.offload_device == card
    latent = ksampler(model, cond(), cond(5, 2), empty_latent(), steps=1)
    assert vae.decode(latent).device == card
    assert clip.encode_from_tokens(clip.tokenize("a cup")).device == card


def test_without_smart_memory_our_models_leave_for_any_other(
    model: Any, comfy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    ksampler(model, cond(), cond(5, 2), empty_latent(), steps=1)
    assert model.loaded_size() > 0
    management.free_memory(0, model.load_device)
    assert model.loaded_size() > 0
    monkeypatch.setattr(management, "DISABLE_SMART_MEMORY", True)
    management.free_memory(0, model.load_device)
    assert model.loaded_size() == model.model.transformer.loaded_bytes == 0


def test_a_refusal_is_our_error(given: Any, load: Any) -> None:
    with pytest.raises(QwenLowVRAMError):
        load(weight_format="none")


@pytest.mark.parametrize(("given", "kept"), [(float("nan"), 0), (-4.0, 0), (float("inf"), 1 << 60), (1.5, 3 * 2**29)])
def test_numbers_that_are_no_memory_reserve_none_or_all(
    given: float, kept: int, comfy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.cli_args import args
    from qwenimage_lowvram.nodes.adapters import switches

    monkeypatch.setattr("comfy.model_management.extra_reserved_memory", lambda: given * 2**30)
    monkeypatch.setattr(args, "vram_headroom", 0)
    monkeypatch.setattr(args, "cache_ram", [given], raising=False)
    assert switches.reserved_bytes() == switches.cache_ram_bytes() == kept
