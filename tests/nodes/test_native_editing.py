"""The same editing graph on ComfyUI's own classes: text encoder, VAE and transformer, and on ours."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.positions import Positions
from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant
from safetensors.torch import load_file
from split_files import wan_vae_name

from .conftest import cond
from .native_encoder import as_clip, native_encoder
from .test_model import ksampler

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def native(full_pipeline: Path, comfy: Any) -> Iterator[Any]:
    import comfy.sd

    weights = load_file(full_pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    vae = comfy.sd.VAE(sd={wan_vae_name(name): value for name, value in weights.items()}, dtype=torch.float32)
    with native_encoder(full_pipeline) as encoder:
        yield SimpleNamespace(clip=as_clip(*encoder), vae=vae)


@pytest.fixture(scope="module")
def ours(full_pipeline: Path, comfy: Any) -> Any:
    from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP
    from qwenimage_lowvram.nodes.adapters.vae import make_vae

    hardware = Hardware.detect(CPU)
    encoder = TextEncoder(open_checkpoint(full_pipeline / "text_encoder"), dtype=torch.float32, hardware=hardware)
    return SimpleNamespace(
        clip=LowVRAMCLIP(encoder, PromptTokenizer(full_pipeline / "tokenizer"), None),
        vae=make_vae(open_checkpoint(full_pipeline / "vae"), dtype=torch.float32, limit_bytes=None),
    )


def native_model(folder: Path, variant: Variant) -> Any:
    """ComfyUI's own MODEL at the small size."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    given = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    names = ("num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope")
    method = {"default_ref_method": "index_timestep_zero"} if variant is Variant.EDIT_2511 else {}
    settings = {"image_model": "qwen_image", "in_channels": 64, **{name: given[name] for name in names}, **method}
    config = comfy.supported_models.QwenImage(settings)
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.QwenImage(config, device=CPU)
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    result = model.diffusion_model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"__index_timestep_zero__"}
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def our_model(folder: Path, variant: Variant, positions: Positions = Positions.COMFYUI) -> Any:
    from qwenimage_lowvram.nodes.adapters.model import make_model

    transformer = QwenImageTransformer(
        open_checkpoint(folder / "transformer"),
        dtype=torch.float32,
        hardware=Hardware.detect(CPU),
        variant=variant,
        positions=positions,
    )
    return make_model(transformer, None)


def made_image(width: int, height: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


def edit(models: Any, variant: Variant, *given: torch.Tensor) -> Any:
    from qwenimage_lowvram.nodes.encode_edit import QwenLowVRAMEncodeEditPrompt

    images = {f"image{i + 1}": shown for i, shown in enumerate(given)}
    encode = QwenLowVRAMEncodeEditPrompt().encode
    return encode(models.clip, models.vae, "make it red", "blurry", 0.02, 0, 0, 1, variant.value, **images)["result"]


SHOWN = {
    "one": [(192, 128)],
    "three": [(192, 128), (128, 128), (100, 150)],
    "odd": [(176, 112)],
    "longer ones": [(112, 112), (320, 64)],
}
# height and width in patches: even, odd, odd one way, and below any reference
SIZES = [(8, 12), (7, 11), (7, 3), (4, 9)]
# of references, in latents: odd counts of patches, half patches, longer than most of the images
REFERENCES = [(14, 22), (9, 13), (40, 6)]


@pytest.mark.parametrize("variant", [Variant.EDIT_2509, Variant.EDIT_2511], ids=lambda variant: variant.value)
@pytest.mark.parametrize("shown", SHOWN)
def test_an_edit_is_that_of_comfyuis_own_models(
    shown: str, variant: Variant, ours: Any, native: Any, full_pipeline: Path
) -> None:
    images = [made_image(*size, seed=i) for i, size in enumerate(SHOWN[shown])]
    results = []
    for models, make in ((ours, our_model), (native, native_model)):
        positive, negative, latent = edit(models, variant, *images)
        results.append(ksampler(make(full_pipeline, variant), positive, negative, latent))
    made, wanted = results
    assert made.shape[1:3] == (16, 1)
    assert wanted.std() > 0.5
    assert (made - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("count", "method"), [(0, None), *((count, m) for count in (1, 3) for m in (None, "index", "offset", "uxo"))]
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_any_count_of_patches_are_comfyuis_own(
    size: tuple[int, int], count: int, method: str | None, full_pipeline: Path
) -> None:
    latent = {"samples": torch.zeros(1, 16, 1, size[0] * 2, size[1] * 2)}
    generator = torch.Generator().manual_seed(3)
    shown = [torch.randn(1, 16, 1, *reference, generator=generator) for reference in REFERENCES[:count]]
    extra = ({"reference_latents": shown} if shown else {}) | ({"reference_latents_method": method} if method else {})
    variant = Variant.EDIT_2509 if shown else Variant.QWEN_IMAGE
    models = our_model(full_pipeline, variant), native_model(full_pipeline, variant)
    made, wanted = (ksampler(model, cond(**extra), cond(5, 2, **extra), latent) for model in models)
    assert wanted.std() > 0.5
    assert (made - wanted).abs().max() < 1e-4


def test_positions_of_diffusers_are_another_image_at_odd_counts_only(full_pipeline: Path) -> None:
    ours = [our_model(full_pipeline, Variant.QWEN_IMAGE, positions) for positions in Positions]
    for size, same in (((8, 12), True), ((7, 12), False)):
        latent = {"samples": torch.zeros(1, 16, 1, size[0] * 2, size[1] * 2)}
        made, other = (ksampler(model, cond(), cond(5, 2), latent) for model in ours)
        assert torch.equal(made, other) == same


@pytest.mark.parametrize("clip", ["ours", "native"])
@pytest.mark.parametrize("vae", ["ours", "native"])
def test_any_mix_of_encoders_gives_the_same(clip: str, vae: str, ours: Any, native: Any, full_pipeline: Path) -> None:
    sets = {"ours": ours, "native": native}
    mixed = SimpleNamespace(clip=sets[clip].clip, vae=sets[vae].vae)
    results = [edit(models, Variant.EDIT_2509, made_image(100, 70)) for models in (ours, mixed)]
    model = our_model(full_pipeline, Variant.EDIT_2509)
    made, other = (ksampler(model, positive, negative, latent) for positive, negative, latent in results)
    assert (made - other).abs().max() < 1e-4
