"""Devices that are not here, by stand-ins: Intel's memory is shown, and what Apple's cannot decode is refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from qwenimage_lowvram.engine.errors import MissingPackage, Unsupported
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from split_files import write_split_files


def test_memory_of_an_intel_card_is_counted(comfy: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenimage_lowvram.engine.runs.memory_watch import MemoryWatch

    resets: list[torch.device] = []
    counter = SimpleNamespace(
        memory_allocated=lambda device: 5, max_memory_allocated=lambda device: 9, reset_peak_memory_stats=resets.append
    )
    monkeypatch.setattr(torch, "xpu", counter)
    watch = MemoryWatch(torch.device("xpu"))
    watch.begin_stage()
    assert (watch.vram(), watch.stage_peak_vram(), watch.peak_vram()) == (5, 9, 9)
    assert resets == [torch.device("xpu")]
    assert MemoryWatch(torch.device("cpu")).vram() is None


def test_only_apples_devices_cannot_decode_fp8() -> None:
    assert not Hardware.detect(torch.device("mps")).decodes_fp8
    assert all(Hardware.detect(torch.device(kind)).decodes_fp8 for kind in ("cpu", "cuda", "xpu"))


@pytest.mark.parametrize("dtype", ["fp8", "fp8_scaled", "nvfp4", "mxfp8"])
def test_fp8_weights_are_refused_by_name_where_the_device_cannot_decode_them(
    dtype: str, small_pipeline: Path, tmp_path: Path
) -> None:
    names = write_split_files(small_pipeline, tmp_path, dtype=dtype, text_dtype="fp8_scaled")
    apple = replace(Hardware.detect(torch.device("cpu")), decodes_fp8=False)
    file = tmp_path / "diffusion_models" / names.transformer
    words = r"(?s)weights in (F8_E4M3|NVFP4|MXFP8), which cannot be decoded on .*What to do: use a GGUF, bf16 or int8"
    with pytest.raises(Unsupported, match=words):
        QwenImageTransformer(open_checkpoint(file), dtype=torch.float32, hardware=apple)
    text = open_checkpoint(tmp_path / "text_encoders" / names.text_encoder)
    with pytest.raises(Unsupported, match=words):
        TextEncoder(text, dtype=torch.float32, hardware=apple)


def test_mxfp8_is_refused_by_name_with_the_oldest_torch(
    small_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_split_files(small_pipeline, tmp_path, dtype="mxfp8", text_dtype="bf16")
    monkeypatch.delattr(torch, "float8_e8m0fnu")  # which torch 2.6 has not
    file = open_checkpoint(tmp_path / "diffusion_models" / names.transformer)
    with pytest.raises(MissingPackage, match=r"weights in mxfp8, whose scales need torch 2\.7 or newer"):
        QwenImageTransformer(file, dtype=torch.float32, hardware=Hardware.detect(torch.device("cpu")))
