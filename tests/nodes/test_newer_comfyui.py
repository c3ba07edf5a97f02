"""What ComfyUI's later versions ask of a MODEL, by stand-ins with their signatures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import Unsupported

from .conftest import cond, empty_latent
from .test_model import ksampler


def test_clones_are_made_where_patchers_take_fast_disk(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since 0.34 `ModelPatcher.__init__` takes it, and `clone()` hands it on."""
    from comfy.model_patcher import ModelPatcher

    init, clone = ModelPatcher.__init__, ModelPatcher.clone

    def newer_init(self: Any, *args: Any, fast_disk: bool = False, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.fast_disk = fast_disk

    def newer_clone(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched = type(self).__init__
        monkeypatch.setattr(type(self), "__init__", lambda new, *a, **k: patched(new, *a, fast_disk=True, **k))
        try:
            return clone(self, *args, **kwargs)
        finally:
            monkeypatch.setattr(type(self), "__init__", patched)

    monkeypatch.setattr(ModelPatcher, "__init__", newer_init)
    monkeypatch.setattr(ModelPatcher, "clone", newer_clone)
    copy = model.clone()
    assert copy.fast_disk
    assert copy.loras == model.loras
    wanted = ksampler(model, cond(), cond(5, 2), empty_latent())
    assert torch.equal(ksampler(copy, cond(), cond(5, 2), empty_latent()), wanted)


def test_objects_in_model_options_that_clones_share_are_not_changed(model: Any) -> None:
    """Later clones copy lists and dicts of model_options, and share what else is in them."""
    from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

    shared = object()
    model.model_options["transformer_options"]["others"] = shared
    before = dict(model.model_options)
    out = QwenLowVRAMSample().sample(
        model, cond(), cond(5, 2), empty_latent(), 1, 1, 4.0, "euler", "qwen_image", 1.0, True
    )
    assert out["result"][0]["samples"].isfinite().all()
    assert model.model_options == before
    assert model.model_options["transformer_options"]["others"] is shared


def test_a_second_copy_for_another_card_is_refused_by_name(model: Any) -> None:
    with pytest.raises(Unsupported, match=r"MultiGPU, Select Model Device.*\n\nWhat to do: .*transformer_device"):
        model.deepclone_multigpu(new_load_device=torch.device("meta"))


def test_another_device_than_the_loaders_is_refused_before_sampling(model: Any) -> None:
    moved = model.clone()
    moved.load_device = torch.device("meta")
    with pytest.raises(Unsupported, match="Moving the model from cpu to meta"):
        ksampler(moved, cond(), cond(5, 2), empty_latent())


def test_another_device_for_the_text_encoder_is_refused_by_name(full_pipeline: Path) -> None:
    """ComfyUI's node tells the patcher of CLIP, which holds nothing."""
    from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
    from qwenimage_lowvram.engine.hardware import Hardware
    from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
    from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer
    from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP

    cpu = Hardware.detect(torch.device("cpu"))
    encoder = TextEncoder(open_checkpoint(full_pipeline / "text_encoder"), dtype=torch.float32, hardware=cpu)
    moved = LowVRAMCLIP(encoder, PromptTokenizer(full_pipeline / "tokenizer"), None).clone()
    moved.patcher.load_device = torch.device("meta")
    with pytest.raises(Unsupported, match=r"Select CLIP Device.*\n\nWhat to do: .*text_encoder_device"):
        moved.encode_from_tokens_scheduled(moved.tokenize("a cat"))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_that_names_an_attention_kernel_is_read(prefix: str, small_pipeline: Path, tmp_path: Path) -> None:
    from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
    from qwenimage_lowvram.engine.hardware import Hardware
    from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
    from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
    from qwenimage_lowvram.nodes.adapters.vae import make_vae
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from split_files import write_split_files

    note = torch.tensor(list(b'{"kernel": "comfy_kitchen_int8"}'), dtype=torch.uint8)
    names = write_split_files(small_pipeline, tmp_path, dtype="bf16", prefix=prefix)
    for folder, name, places in (
        ("diffusion_models", names.transformer, (prefix, f"{prefix}transformer_blocks.0.attn.")),
        ("text_encoders", names.text_encoder, ("model.", "model.layers.0.self_attn.", "visual.blocks.0.attn.")),
        ("vae", names.vae, ("", "decoder.middle.1.")),
    ):
        file = tmp_path / folder / name
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file(
            load_file(file) | {f"{place}comfy_attention.config": note.clone() for place in places}, file, metadata
        )
    cpu = Hardware.detect(torch.device("cpu"))
    folder = tmp_path / "diffusion_models" / names.transformer
    assert QwenImageTransformer(open_checkpoint(folder), dtype=torch.float32, hardware=cpu).config.num_layers == 4
    encoder = open_checkpoint(tmp_path / "text_encoders" / names.text_encoder)
    assert TextEncoder(encoder, dtype=torch.float32, hardware=cpu).encode([[5, 9]])[0].isfinite().all()
    assert TextEncoder(encoder, dtype=torch.float32, hardware=cpu).vision_tower().footprint.blocks
    vae = open_checkpoint(tmp_path / "vae" / names.vae)
    assert make_vae(vae, dtype=torch.float32, limit_bytes=None).output_channels == 3
