"""Qwen-Image-Layered: known by its tensors, and bit-equal to diffusers' own forward pass for any number of layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import InvalidRequest, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.latents import pack, shape_in_patches, unpack
from qwenimage_lowvram.engine.models.qwen_image.positions import MAX_POSITIONS
from qwenimage_lowvram.engine.models.qwen_image.tensors import sort_transformer
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer, TimestepRounding
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant
from torch import Tensor

LAYERED = {"use_additional_t_cond": True, "use_layer3d_rope": True}
ADDED = "time_text_embed.addition_t_embedding.weight"
LAYERS, TEXT_DIM = 5, 32
RESIDENT = [(), (1, 3), tuple(range(LAYERS))]
Tiny = Callable[..., tuple[Any, Path]]
Shapes = dict[str, tuple[int, ...]]


def make_branch(
    length: int,
    image: tuple[int, int, int],
    reference: tuple[int, int, int] | None,
    *,
    dtype: torch.dtype = torch.float32,
    additional_t_cond: int = 0,
) -> Branch:
    generator = torch.Generator().manual_seed(length)
    shapes = (image,) if reference is None else (image, reference)
    return Branch(
        torch.randn(1, sum(f * h * w for f, h, w in shapes), 64, generator=generator).to(dtype),
        shapes,
        torch.randn(1, length, TEXT_DIM, generator=generator).to(dtype),
        None,
        0.7,
        additional_t_cond,
    )


@torch.no_grad()
def diffusers_forward(model: Any, branch: Branch) -> Tensor:
    """As QwenImageLayeredPipeline calls it: each layer is an image of its own."""
    (frames, height, width), *reference = branch.shapes
    out = model(
        hidden_states=branch.tokens,
        encoder_hidden_states=branch.prompt_embeds,
        timestep=torch.tensor([branch.timestep]).mul(1000).to(branch.tokens.dtype) / 1000,
        img_shapes=[[*[(1, height, width)] * frames, *reference]],
        additional_t_cond=torch.tensor([branch.additional_t_cond]),
        return_dict=False,
    )[0]
    return out[:, : frames * height * width]


def open_transformer(folder: Path, dtype: torch.dtype, hardware: Hardware) -> QwenImageTransformer:
    return QwenImageTransformer(
        open_checkpoint(folder), dtype=dtype, hardware=hardware, rounding=TimestepRounding.DIFFUSERS
    )


# layers, height and width in patches: even, odd, more layers than half a side has patches, a larger reference
IMAGES = [((4, 6, 10), (1, 6, 10)), ((3, 7, 5), (1, 7, 5)), ((6, 4, 4), (1, 4, 4)), ((2, 4, 6), (1, 8, 12))]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("image", "reference"), IMAGES, ids=str)
def test_layers_are_diffusers_own_wherever_the_blocks_live(
    image: tuple[int, int, int], reference: tuple[int, int, int], dtype: torch.dtype, tiny: Tiny, cpu: Hardware
) -> None:
    model, folder = tiny(dtype, **LAYERED)
    transformer = open_transformer(folder, dtype, cpu)
    branches = [make_branch(length, image, reference, dtype=dtype) for length in (13, 5)]
    expected = [diffusers_forward(model, branch) for branch in branches]
    for resident in RESIDENT:
        transformer.load(resident)
        with transformer.session(slots=2) as session:
            made = session.forward(branches)
        assert all(torch.equal(m, e) for m, e in zip(made, expected, strict=True))


def test_the_additional_condition_has_modulation_of_its_own(tiny: Tiny, hardware: Hardware) -> None:
    model, folder = tiny(torch.float32, **LAYERED)
    transformer = open_transformer(folder, torch.float32, hardware)
    transformer.load([])
    transformer.modulation.announce([0.7])
    branches = [make_branch(9, (3, 4, 6), (1, 4, 6), additional_t_cond=i) for i in (0, 1)]
    with transformer.session(slots=1) as session:
        made = session.forward(branches)
    assert (made[0] - made[1]).abs().max() > 1e-3
    assert all(torch.equal(m, diffusers_forward(model, b)) for m, b in zip(made, branches, strict=True))


def test_where_the_text_stands_does_not_depend_on_an_image_being_shown(tiny: Tiny, cpu: Hardware) -> None:
    from qwenimage_lowvram.engine.models.qwen_image.positions import rotary_tables

    model, _ = tiny(torch.float32, **LAYERED)
    shown = rotary_tables(model.pos_embed, [(3, 4, 6), (1, 4, 6)], 7, layered=True)
    alone = rotary_tables(model.pos_embed, [(3, 4, 6)], 7, layered=True)
    assert alone[0].shape[0] == 3 * 24
    assert torch.equal(shown[0][: 3 * 24], alone[0])
    assert torch.equal(shown[1], alone[1])


def test_positions_beyond_the_tables_and_two_references_are_refused(tiny: Tiny, cpu: Hardware) -> None:
    _, folder = tiny(torch.float32, **LAYERED)
    transformer = open_transformer(folder, torch.float32, cpu)
    transformer.load([])
    two = make_branch(5, (2, 4, 4), (1, 4, 4))
    two = Branch(two.tokens, (*two.shapes, (1, 4, 4)), two.prompt_embeds, None, 0.7)
    long = make_branch(MAX_POSITIONS - 5, (6, 4, 4), (1, 4, 4))
    with transformer.session(slots=1) as session:
        with pytest.raises(InvalidRequest, match="Only one image can be taken apart at a time, but 2 are given"):
            session.forward([two])
        with pytest.raises(InvalidRequest, match=f"positions for {MAX_POSITIONS - 6}"):
            session.forward([long])


@pytest.mark.parametrize(("batch", "frames", "height", "width"), [(1, 5, 4, 6), (2, 3, 8, 4), (2, 1, 4, 4)])
def test_layers_are_packed_as_diffusers_packs_them(batch: int, frames: int, height: int, width: int) -> None:
    from diffusers import QwenImageLayeredPipeline

    latents = torch.randn(batch, 16, frames, height, width)
    tokens = pack(latents)
    as_they_have_them = latents.permute(0, 2, 1, 3, 4).contiguous()
    assert torch.equal(
        tokens, QwenImageLayeredPipeline._pack_latents(as_they_have_them, batch, 16, height, width, frames)
    )
    assert torch.equal(unpack(tokens, height, width, frames), latents)
    theirs = QwenImageLayeredPipeline._unpack_latents(tokens, height * 8, width * 8, frames - 1, 8)
    assert torch.equal(theirs, latents)
    assert shape_in_patches(latents) == (frames, height // 2, width // 2)


@pytest.mark.parametrize(
    "name",
    ["qwen_image_layered_bf16", "qwen_image_layered_control_bf16", "qwen_image_layered_fp8mixed", "my_model"],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_layered_file_is_known_by_its_tensors(
    prefix: str, name: str, transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    shapes = {prefix + key: shape for key, shape in {**transformer_shapes, ADDED: (2, 128)}.items()}
    checkpoint = open_checkpoint(write_model(tmp_path / f"{name}.safetensors", shapes))
    found = sort_transformer(checkpoint)
    assert (found.variant, found.config.use_additional_t_cond, found.config.use_layer3d_rope) == (
        Variant.LAYERED,
        True,
        True,
    )
    assert not found.config.zero_cond_t
    with pytest.raises(WrongModel, match=r"is Qwen-Image-Layered, but the variant Qwen-Image was chosen"):
        sort_transformer(checkpoint, Variant.QWEN_IMAGE)


def test_another_file_is_not_made_a_layered_one_by_choice(
    transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "qwen_image_layered.safetensors", transformer_shapes))
    with pytest.raises(WrongModel, match=r"By its tensors, .* is not Qwen-Image-Layered"):
        sort_transformer(checkpoint, Variant.LAYERED)


@pytest.mark.parametrize("weight_format", ["Q8_0", "Q4_0"])
def test_a_gguf_file_is_layered_too(weight_format: str, tiny: Tiny, tmp_path: Path, cpu: Hardware) -> None:
    import json

    from gguf_files import write_gguf_transformer

    model, folder = tiny(torch.float32, **LAYERED)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    file = tmp_path / f"qwen-image-layered-{weight_format}.gguf"
    write_gguf_transformer(file, model.state_dict(), config, weight_format)
    transformer = open_transformer(file, torch.float32, cpu)
    assert transformer.variant is Variant.LAYERED
    transformer.load([])
    branch = make_branch(9, (3, 4, 6), (1, 4, 6))
    with transformer.session(slots=1) as session:
        (made,) = session.forward([branch])
    expected = diffusers_forward(model, branch)
    assert (made - expected).norm() < (0.02 if weight_format == "Q8_0" else 0.3) * expected.norm()


def test_a_quantized_layered_model_keeps_its_condition(tiny: Tiny, tmp_path: Path, cpu: Hardware) -> None:
    from qwenimage_lowvram.engine.caches.requantized_weights import RequantizedWeights

    model, folder = tiny(torch.bfloat16, **LAYERED)
    weights = RequantizedWeights.of(open_checkpoint(folder), "int8", tmp_path)
    assert weights is not None
    header = weights.checkpoint(data_start=0)
    found = sort_transformer(header)
    assert (found.variant, ADDED in found.outside) == (Variant.LAYERED, True)
    assert found.outside[ADDED].shape == tuple(model.time_text_embed.addition_t_embedding.weight.shape)
