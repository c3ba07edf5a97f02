"""What a file is, is told from its names; a file in the wrong place is told where it belongs."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import WrongModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models import foreign
from qwenimage_lowvram.engine.models.component import Component
from qwenimage_lowvram.engine.models.qwen25_vl.component import TEXT_ENCODER
from qwenimage_lowvram.engine.models.qwen25_vl.tensors import sort_text_encoder
from qwenimage_lowvram.engine.models.qwen_image.component import TRANSFORMER
from qwenimage_lowvram.engine.models.qwen_image.tensors import sort_transformer
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.qwen_image_21.component import TRANSFORMER_21
from qwenimage_lowvram.engine.models.qwen_image_vae.component import VAE
from qwenimage_lowvram.engine.models.qwen_image_vae.tensor_names import needed_tensors, require_image_vae, vae_tensors
from qwenimage_lowvram.engine.models.recognition import identify, only, require

Shapes = dict[str, tuple[int, ...]]

TEXT_LAYER = {
    "self_attn.q_proj.weight": (256, 256),
    "self_attn.q_proj.bias": (256,),
    "self_attn.k_proj.weight": (128, 256),
    "mlp.gate_proj.weight": (512, 256),
}
TEXT: Shapes = {
    **{f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in TEXT_LAYER.items()},
    "model.embed_tokens.weight": (300, 256),
    "model.norm.weight": (256,),
    "lm_head.weight": (300, 256),
    "visual.blocks.0.attn.qkv.weight": (96, 32),
}

# a few telling names of each, as their files have them
OTHERS = {
    "lora of diffusers": ("transformer_blocks.0.attn.to_q.lora_A.weight", foreign.LORA),
    "lora of kohya": ("lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight", foreign.LORA),
    "lora of peft": ("transformer.transformer_blocks.0.attn.add_q_proj.lora_B.default.weight", foreign.LORA),
    "a model under PEFT": ("transformer_blocks.0.attn.to_q.base_layer.weight", foreign.UNMERGED),
    "previews of Wan's": ("decoder.3.conv.0.weight", foreign.TINY_VAE),
    "previews of diffusers": ("decoder.layers.3.conv.0.weight", foreign.TINY_VAE),
    "lokr": ("lycoris_transformer_blocks_0_attn_to_q.lokr_w1", foreign.LORA),
    "flux of the authors": ("double_blocks.0.img_attn.qkv.weight", foreign.FLUX),
    "flux of ComfyUI": ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", foreign.FLUX),
    "flux of diffusers": ("single_transformer_blocks.0.attn.to_q.weight", foreign.FLUX),
    "wan": ("blocks.0.cross_attn.q.weight", foreign.WAN),
    "sdxl": ("model.diffusion_model.input_blocks.0.0.weight", foreign.STABLE_DIFFUSION),
    "sdxl of diffusers": ("down_blocks.1.attentions.0.proj_in.weight", foreign.STABLE_DIFFUSION),
    "vae of diffusers": ("decoder.conv_in.weight", VAE),
    "vae of Wan": ("decoder.conv1.weight", VAE),
    "sd3": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", foreign.STABLE_DIFFUSION),
    "DiffSynth": ("controlnet_blocks.0.x_rms.weight", foreign.MODEL_PATCH),
    "controlnet of diffusers": ("controlnet_blocks.0.weight", foreign.CONTROLNET),
    "nunchaku": ("transformer_blocks.0.attn.to_qkv.qweight", foreign.OTHER_QUANTIZATION),
    "quanto": ("transformer_blocks.0.attn.add_q_proj.weight._data", foreign.OTHER_QUANTIZATION),
    "torchao": ("transformer_blocks.0.attn.add_q_proj._weight_qdata", foreign.OTHER_QUANTIZATION),
    "compressed-tensors": ("transformer_blocks.0.attn.add_q_proj.weight_packed", foreign.OTHER_QUANTIZATION),
    "2.1 of diffusers": ("transformer_blocks.0.img_mlp.gate_layer.weight", TRANSFORMER_21),
    "2.1 of ComfyUI": ("model.diffusion_model.transformer_blocks.0.img_mlp.gate_up.weight", TRANSFORMER_21),
    "2.1 without its blocks": ("txt_in.text_norm.weight", TRANSFORMER_21),
    "something": ("weight", foreign.UNKNOWN),
}
FOLDERS = {foreign.LORA: "loras", VAE: "vae", foreign.CONTROLNET: "controlnet"}
FOLDERS |= {foreign.MODEL_PATCH: "model_patches", foreign.TINY_VAE: "vae_approx"}


@pytest.fixture(scope="module")
def vae_shapes() -> Shapes:
    """Names and shapes of a narrow Qwen-Image VAE in diffusers' names, its video tensors included."""
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in AutoencoderKLQwenImage(base_dim=4).named_parameters()}


@pytest.mark.parametrize(("name", "component"), OTHERS.values(), ids=OTHERS.keys())
def test_another_model_in_the_transformers_place_is_named(
    name: str, component: Component, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "m.safetensors", {name: (4, 4)}))
    assert identify(checkpoint.tensors) is component
    with pytest.raises(WrongModel) as caught:
        sort_transformer(checkpoint)
    message = str(caught.value)
    assert f"m.safetensors is {component.value} (1 tensors); a Qwen-Image transformer is needed here." in message
    assert ("It belongs in models/" in message) == (component in FOLDERS)
    if component in FOLDERS:
        assert f"It belongs in models/{FOLDERS[component]}." in message
    assert message.endswith("Choose a file from models/diffusion_models, such as qwen_image_fp8_e4m3fn.safetensors.")


@pytest.mark.parametrize("wanted", [TRANSFORMER, TEXT_ENCODER, VAE])
@pytest.mark.parametrize("given", [TRANSFORMER, TEXT_ENCODER, VAE])
def test_each_file_passes_in_its_own_place_only(
    wanted: Component,
    given: Component,
    transformer_shapes: Shapes,
    tmp_path: Path,
    write_model: Callable[..., Path],
) -> None:
    shapes = {
        TRANSFORMER: transformer_shapes,
        TEXT_ENCODER: TEXT,
        VAE: {"decoder.conv_in.weight": (4, 4), "encoder.conv_in.weight": (4, 4)},
    }[given]
    checkpoint = open_checkpoint(write_model(tmp_path / "m.safetensors", shapes))
    if wanted is given:
        require(checkpoint, wanted)
    else:
        with pytest.raises(WrongModel, match=f"is {given.value} .*; {wanted.value} is needed here"):
            require(checkpoint, wanted)


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "dit."]
)
def test_a_transformer_is_sorted_alike_under_every_prefix(
    prefix: str, transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    file = write_model(tmp_path / "m.safetensors", {prefix + name: shape for name, shape in transformer_shapes.items()})
    sorted_ = sort_transformer(open_checkpoint(file))
    config = sorted_.config
    assert (config.num_layers, config.num_attention_heads, config.attention_head_dim) == (2, 1, 128)
    assert (config.joint_attention_dim, config.in_channels, config.out_channels) == (16, 64, 16)
    assert config.axes_dims_rope == (16, 56, 56)
    assert not config.zero_cond_t
    assert len(sorted_.outside) + sum(map(len, sorted_.blocks)) == len(transformer_shapes)
    assert "img_mod.1.weight" in sorted_.blocks[1]


def test_a_missing_block_is_counted(
    transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    shapes = {n.replace("blocks.1.", "blocks.3."): s for n, s in transformer_shapes.items()}
    with pytest.raises(WrongModel, match=r"m.safetensors: only 2 of the blocks 0 to 3 are in the file"):
        sort_transformer(open_checkpoint(write_model(tmp_path / "m.safetensors", shapes)))


@pytest.mark.parametrize("name", ["img_in.weight", "txt_in.weight", "proj_out.weight"])
def test_a_missing_tensor_outside_the_blocks_is_named(
    name: str, transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    shapes = {n: s for n, s in transformer_shapes.items() if n != name}
    with pytest.raises(WrongModel, match=rf"lacks {name}"):
        sort_transformer(open_checkpoint(write_model(tmp_path / "m.safetensors", shapes)))


@pytest.mark.parametrize("name", ["attn.to_q.weight", "img_mod.1.bias", "txt_mlp.net.2.weight"])
@pytest.mark.parametrize("damage", ["missing", "wrong shape"])
def test_a_block_that_is_not_whole_is_named(
    name: str, damage: str, transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path], cpu: Hardware
) -> None:
    shapes = dict(transformer_shapes)
    shape = shapes.pop(f"transformer_blocks.1.{name}")
    if damage == "wrong shape":
        shapes[f"transformer_blocks.1.{name}"] = (7, *shape[1:])
    checkpoint = open_checkpoint(write_model(tmp_path / "m.safetensors", shapes))
    wanted = rf"block 1 lacks {name}" if damage == "missing" else rf"block 1: {name} has shape \[7.*\[{shape[0]}"
    with pytest.raises(WrongModel, match=wanted):
        QwenImageTransformer(checkpoint, dtype=torch.bfloat16, hardware=cpu)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer_blocks.0.attn.norm_q.weight", ()),
        ("transformer_blocks.0.attn.norm_q.weight", (0,)),
        ("img_in.weight", (64,)),
        ("txt_in.weight", (64,)),
        ("transformer_blocks.x.attn.to_q.weight", (4, 4)),
        ("transformer_blocks.0", (4, 4)),
    ],
)
def test_shapes_that_no_transformer_has_are_a_wrong_model(
    name: str, shape: tuple[int, ...], transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    shapes = {**transformer_shapes, name: shape}
    with pytest.raises(WrongModel):
        sort_transformer(open_checkpoint(write_model(tmp_path / "m.safetensors", shapes)))


@pytest.mark.parametrize("axes", [[16, 56, 58], [15, 56, 57], 3, "abc", [None] * 3])
def test_rotary_axes_that_do_not_add_up_are_refused(
    axes: Any, transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    metadata = {"config": json.dumps({"axes_dims_rope": axes})}
    with pytest.raises(WrongModel, match="rotary axes"):
        sort_transformer(open_checkpoint(write_model(tmp_path / "m", transformer_shapes, metadata=metadata)))


@pytest.mark.parametrize(
    "prefix",
    ["model.", "model.language_model.", "language_model.model.", "", "text_encoders.qwen25_7b.transformer.model."],
)
def test_a_text_encoder_is_sorted_alike_under_every_prefix(
    prefix: str, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    shapes = {prefix + n.removeprefix("model.") if n.startswith("model.") else n: s for n, s in TEXT.items()}
    sorted_ = sort_text_encoder(open_checkpoint(write_model(tmp_path / "m.safetensors", shapes)))
    assert sorted(sorted_.outside) == ["embed_tokens.weight", "norm.weight"]
    assert [sorted(layer) for layer in sorted_.layers] == [sorted(TEXT_LAYER)] * 3
    config = sorted_.config
    assert (config["hidden_size"], config["intermediate_size"], config["vocab_size"]) == (256, 512, 300)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    assert config["mrope_section"] == (16, 24, 24)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_text_encoder_that_is_not_whole_is_named(name: str, tmp_path: Path, write_model: Callable[..., Path]) -> None:
    shapes = {n: s for n, s in TEXT.items() if n != name}
    with pytest.raises(WrongModel, match=name.removeprefix("model.")):
        sort_text_encoder(open_checkpoint(write_model(tmp_path / "m.safetensors", shapes)))


@pytest.mark.parametrize("name", ["self_attn.k_proj.weight", "mlp.gate_proj.weight"])
def test_a_layer_that_is_not_whole_is_named(name: str, tmp_path: Path, write_model: Callable[..., Path]) -> None:
    shapes = {n: s for n, s in TEXT.items() if n != f"model.layers.0.{name}"}
    with pytest.raises(WrongModel, match=name):
        sort_text_encoder(open_checkpoint(write_model(tmp_path / "m.safetensors", shapes)))


@pytest.mark.parametrize(
    "names",
    [
        # CLIP-L, T5, and the language model of another text encoder (Qwen3), as their files name them
        ["text_model.encoder.layers.0.self_attn.q_proj.weight", "text_model.encoder.layers.0.self_attn.q_proj.bias"],
        ["encoder.block.0.layer.0.SelfAttention.q.weight"],
        ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_norm.weight"],
        # Qwen2-VL, whose language model has the same names and shapes; its vision part tells it
        [*(f"model.layers.0.self_attn.q_proj.{kind}" for kind in ("weight", "bias")), "visual.blocks.0.mlp.fc1.weight"],
    ],
)
def test_the_text_encoder_of_another_model_is_not_taken_for_a_damaged_one(
    names: list[str], tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    shapes = {**dict.fromkeys(names, (128, 128)), "model.embed_tokens.weight": (9, 128), "model.norm.weight": (128,)}
    with pytest.raises(WrongModel, match=r"is the text encoder of another model.*a Qwen2.5-VL text encoder is needed"):
        sort_text_encoder(open_checkpoint(write_model(tmp_path / "m.safetensors", shapes)))


@pytest.mark.parametrize("kept", [r"\.attn\.", r"transformer_blocks\."])
def test_a_file_of_some_layers_is_said_to_be_a_part(
    kept: str, transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    shapes = {name: shape for name, shape in transformer_shapes.items() if re.search(kept, name)}
    checkpoint = open_checkpoint(write_model(tmp_path / "m.safetensors", shapes))
    with pytest.raises(
        WrongModel, match=rf"m\.safetensors holds only part of a Qwen-Image transformer \({len(shapes)} "
    ) as e:
        require(checkpoint, TRANSFORMER)
    assert "ownload" not in str(e.value)
    assert ("img_mod" in str(e.value)) == ("attn" in kept)


def test_an_all_in_one_file_holds_each_of_its_three_components(
    transformer_shapes: Shapes, vae_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    text = {f"text_encoders.qwen25_7b.transformer.{name}": shape for name, shape in TEXT.items()}
    drawn = {f"model.diffusion_model.{name}": shape for name, shape in transformer_shapes.items()}
    vae = {f"vae.{name}": shape for name, shape in vae_shapes.items()}
    file = open_checkpoint(write_model(tmp_path / "all.safetensors", {**drawn, **text, **vae}))
    for component in (TRANSFORMER, TEXT_ENCODER, VAE):
        require(file, component)
    assert sort_transformer(file).config.num_layers == 2
    assert len(sort_text_encoder(file).layers) == 3
    assert set(vae_tensors(file)) == set(vae_shapes)


@pytest.mark.parametrize(
    "prefixes",
    [
        ("model.diffusion_model.", "text_encoders.qwen25_7b.transformer.", "vae."),
        ("", "text_encoder.", "first_stage_model."),
        ("transformer.", "", "vae."),
    ],
)
def test_one_component_of_an_all_in_one_file_is_what_its_own_file_would_hold(
    prefixes: tuple[str, str, str],
    transformer_shapes: Shapes,
    vae_shapes: Shapes,
    tmp_path: Path,
    write_model: Callable[..., Path],
) -> None:
    parts = {
        TRANSFORMER: (transformer_shapes, "BF16"),
        TEXT_ENCODER: ({**TEXT, "visual.blocks.0.attn.qkv.weight": (96, 32)}, "BF16"),
        VAE: (vae_shapes, "F32"),
    }
    headers, names = [], {}
    for prefix, (component, (shapes, dtype)) in zip(prefixes, parts.items(), strict=True):
        named = {prefix + name: shape for name, shape in shapes.items()}
        names[component] = set(named)
        file = write_model(tmp_path / "one.safetensors", named, dtype)
        headers.append(open_checkpoint(file).tensors)
    together = replace(open_checkpoint(file), tensors={n: e for header in headers for n, e in header.items()})
    for component, expected in names.items():
        found = only(together, component)
        assert set(found.tensors) == expected
        assert found.full_precision == (component is VAE)
        require(found, component)


@pytest.mark.parametrize(
    ("model", "average"),
    [("model.", "ema."), ("generator.", "generator_ema."), ("module.", "EMA.module."), ("", "ema_model.")],
)
def test_a_model_counts_before_its_running_average(
    model: str, average: str, transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    shapes = {prefix + name: shape for prefix in (model, average) for name, shape in transformer_shapes.items()}
    checkpoint = open_checkpoint(write_model(tmp_path / "m.safetensors", shapes))
    assert sort_transformer(checkpoint).outside["img_in.weight"] is checkpoint.tensors[f"{model}img_in.weight"]


def test_a_running_average_alone_is_a_model(
    transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    shapes = {f"ema.{name}": shape for name, shape in transformer_shapes.items()}
    assert len(sort_transformer(open_checkpoint(write_model(tmp_path / "m.safetensors", shapes))).blocks) == 2


def test_a_file_of_two_models_is_refused_by_their_prefixes(
    transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    shapes = {
        f"{prefix}{name}": shape for prefix in ("student.", "fake.") for name, shape in transformer_shapes.items()
    }
    with pytest.raises(WrongModel, match=r"holds 2 transformers, .* begin with 'fake\.' and 'student\.'"):
        sort_transformer(open_checkpoint(write_model(tmp_path / "m.safetensors", shapes)))


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_a_vae_is_read_under_every_prefix_without_what_strayed_into_its_file(
    prefix: str, vae_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    strays = {"loss.weight": (3,), f"{prefix}ema.decay": (1,)}
    shapes = {prefix + name: shape for name, shape in vae_shapes.items()} | strays
    file = open_checkpoint(write_model(tmp_path / "vae.safetensors", shapes))
    require(file, VAE)
    require_image_vae(file)
    assert not [name for name in needed_tensors(file) if "ema" in name or "loss" in name or "time_conv" in name]


def test_a_vae_that_upscales_is_named(vae_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]) -> None:
    shapes = vae_shapes | {"decoder.conv_out.weight": (12, *vae_shapes["decoder.conv_out.weight"][1:])}
    with pytest.raises(WrongModel, match=r"upscales .* 12 channels"):
        require_image_vae(open_checkpoint(write_model(tmp_path / "vae.safetensors", shapes)))
