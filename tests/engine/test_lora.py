"""LoRA files of every trainer change the weights that ComfyUI, diffusers and PEFT change, and as they do."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from lora_files import DORA, KINDS, STYLES, Parts, change_of, make_parts, write_lora
from packaging.version import Version
from qwenimage_lowvram.engine.errors import DamagedFile, InvalidRequest, MissingFile, Unsupported, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import TensorEntry
from qwenimage_lowvram.engine.formats import raw_layout
from qwenimage_lowvram.engine.lora import deltas as lora_deltas
from qwenimage_lowvram.engine.lora.deltas import Delta, apply, scratch_elements
from qwenimage_lowvram.engine.lora.lora_file import LoraFile, LoraMatch, match, open_lora
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

Weights = dict[str, torch.Tensor]
BLOCK = "transformer_blocks."
# every layer's kind of name once
LAYERS = (
    "img_in",
    "txt_in",
    "proj_out",
    "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_1",
    f"{BLOCK}0.attn.to_q",
    f"{BLOCK}0.attn.add_k_proj",
    f"{BLOCK}1.attn.to_out.0",
    f"{BLOCK}1.attn.to_add_out",
    f"{BLOCK}2.img_mlp.net.0.proj",
    f"{BLOCK}3.txt_mlp.net.2",
    f"{BLOCK}4.img_mod.1",
)
TO_Q = f"{BLOCK}0.attn.to_q"


@pytest.fixture(scope="module")
def weights(tiny: Callable[..., tuple[Any, Path]]) -> Weights:
    return {name: parameter.detach() for name, parameter in tiny()[0].named_parameters()}


@pytest.fixture(scope="module")
def shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


@pytest.fixture(scope="module")
def by_comfyui(comfy: ModuleType, tiny: Callable[..., tuple[Any, Path]]) -> Callable[..., Weights]:
    """`by_comfyui(file, strength, weights)` -> the weights that ComfyUI's loader and calculation change."""
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_base
    import comfy.supported_models
    import comfy.utils

    config = comfy.supported_models.QwenImage({"image_model": "qwen_image", "disable_unet_model_creation": True})
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.QwenImage(config)
    model.diffusion_model = tiny()[0]
    key_map = comfy.lora.model_lora_keys_unet(model, {})

    def change(file: Path, strength: float, weights: Weights) -> Weights:
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(file))), key_map)
        result = {}
        for key, patch in patches.items():
            name = key.removeprefix("diffusion_model.")
            patched = [(strength, patch, 1.0, None, None)]
            result[name] = comfy.lora.calculate_weight(patched, weights[name].clone(), key)
        return result

    return change


def read(entry: TensorEntry) -> torch.Tensor:
    with entry.file.open("rb") as stream:
        stream.seek(entry.offset)
        raw = torch.frombuffer(bytearray(stream.read(entry.nbytes)), dtype=torch.uint8)
    dtype, shape = raw_layout(entry)
    return raw.view(dtype).view(shape)


def change(weight: torch.Tensor, *stack: tuple[Delta, float]) -> torch.Tensor:
    """The changed weight, made in scratch that holds no number and is as small as it may be."""
    scratch = torch.full((scratch_elements(weight.shape, [delta for delta, _ in stack]),), float("nan"))
    result = weight.clone()
    apply(result, [(delta, [read(part) for part in delta.parts], strength) for delta, strength in stack], scratch)
    return result


def change_all(weights: Weights, *stack: tuple[LoraMatch, float]) -> Weights:
    names = {name for found, _ in stack for name in found.deltas}
    return {
        name: change(weights[name], *((found.deltas[name], s) for found, s in stack if name in found.deltas))
        for name in names
    }


def layers_of(shapes: Mapping[str, Sequence[int]], kind: str = "lora", **options: Any) -> dict[str, Parts]:
    return {
        layer: make_parts(kind, shapes[f"{layer}.weight"], seed=i, **options) | {"alpha": torch.tensor(2.0 + i)}
        for i, layer in enumerate(LAYERS)
    }


def assert_same(one: Weights, other: Weights, tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert (weight.double() - other[name].double()).abs().max() < tolerance, name


# spellings

NEWER_DIFFUSERS = Version(diffusers.__version__) >= Version("0.40")


@pytest.mark.parametrize("style", STYLES)
def test_every_trainers_keys_change_the_same_weights(
    style: str,
    weights: Weights,
    shapes: dict[str, tuple[int, ...]],
    by_comfyui: Callable[..., Weights],
    tiny: Callable[..., tuple[Any, Path]],
    tmp_path: Path,
) -> None:
    layers = layers_of(shapes)
    if not STYLES[style].alpha:
        layers = {layer: {name: p for name, p in parts.items() if name != "alpha"} for layer, parts in layers.items()}
    file = write_lora(tmp_path / "l.safetensors", layers, style)
    found = match(open_lora(file), shapes)
    keys = len(LAYERS) * (3 if STYLES[style].alpha else 2)
    assert (found.matched_keys, found.unmatched_keys) == (keys, 0)
    ours = change_all(weights, (found, 0.8))
    expected = {
        f"{layer}.weight": weights[f"{layer}.weight"] + 0.8 * change_of(parts) for layer, parts in layers.items()
    }
    assert_same(ours, expected)
    if STYLES[style].comfyui:
        assert_same(ours, by_comfyui(file, 0.8, weights))
    if STYLES[style].diffusers and (NEWER_DIFFUSERS or not STYLES[style].newer):
        assert_same(ours, by_diffusers(file, 0.8, tiny()[0]))


def by_diffusers(file: Path, strength: float, transformer: Any) -> Weights:
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline(None, None, None, None, copy.deepcopy(transformer))
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    pipeline.fuse_lora(lora_scale=strength)
    return {
        f"{name}.weight": module.base_layer.weight.detach()
        for name, module in pipeline.transformer.named_modules()
        if hasattr(module, "base_layer")
    }


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(3),
        torch.tensor([3.0]),
        torch.tensor(3.0).bfloat16(),
        torch.tensor(3.0).to(torch.float8_e4m3fn),
        torch.tensor(3.0).to(torch.float8_e5m2),
        torch.tensor(3, dtype=torch.int8),
        torch.tensor(3, dtype=torch.uint8),
    ],
    ids=str,
)
def test_an_alpha_of_any_dtype_is_divided_by_the_rank(
    alpha: torch.Tensor, shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    parts = make_parts("lora", shapes["img_in.weight"], rank=4) | {"alpha": alpha}
    file = write_lora(tmp_path / "l.safetensors", {"img_in": parts}, "Lightning")
    assert match(open_lora(file), shapes).deltas["img_in.weight"].scale == 3 / 4


@pytest.mark.parametrize("prefix", ["unet.", "dit.", "module.", "pipe.unet.", "base_model.model.module."])
def test_a_prefix_in_no_list_of_comfyui_is_taken_off(
    prefix: str, shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    file = tmp_path / "l.safetensors"
    save_file(
        {f"{prefix}{TO_Q}.lora_A.weight": torch.ones(2, 64), f"{prefix}{TO_Q}.lora_B.weight": torch.ones(64, 2)}, file
    )
    found = match(open_lora(file), shapes)
    assert (list(found.deltas), found.unmatched) == ([f"{TO_Q}.weight"], ())


def test_of_two_prefixes_that_are_not_known_neither_is_taken_off(
    shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    file = tmp_path / "l.safetensors"
    save_file({f"{prefix}{TO_Q}.lora_A.weight": torch.ones(2, 64) for prefix in ("student.", "critic.")}, file)
    with pytest.raises(WrongModel, match=r"2 of its 2 keys fit no layer"):
        match(open_lora(file), shapes)


def test_a_known_prefix_counts_before_another(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    file = tmp_path / "l.safetensors"
    layers = {f"transformer.{TO_Q}": torch.ones, f"ema.transformer.{TO_Q}": torch.zeros}
    save_file(
        {f"{n}.lora_{part}.weight": make(*size) for n, make in layers.items() for part, size in SIZES.items()}, file
    )
    found = match(open_lora(file), shapes)
    assert (found.matched_keys, found.unmatched_keys) == (2, 2)
    assert not any(key.startswith("transformer.") for key in found.unmatched)


SIZES = {"A": (2, 64), "B": (64, 2)}


def test_a_layer_of_rank_0_changes_nothing_and_is_counted(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    file = tmp_path / "l.safetensors"
    ranks = {"attn.to_q": 2, "attn.to_k": 0}
    tensors = {}
    for layer, rank in ranks.items():
        tensors[f"{BLOCK}0.{layer}.lora_A.weight"] = torch.ones(rank, 64)
        tensors[f"{BLOCK}0.{layer}.lora_B.weight"] = torch.ones(64, rank)
        tensors[f"{BLOCK}0.{layer}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, file)
    found = match(open_lora(file), shapes)
    assert (list(found.deltas), found.unmatched, found.empty_layers) == ([f"{TO_Q}.weight"], (), 1)
    assert "1 layer of rank 0 changes nothing" in str(found)


# kinds


@pytest.mark.parametrize("strength", [1.0, 0.6, -1.3])
@pytest.mark.parametrize("dora", [None, *DORA])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "diff"])
def test_every_kind_computes_what_comfyui_computes(
    kind: str,
    dora: str | None,
    strength: float,
    weights: Weights,
    shapes: dict[str, tuple[int, ...]],
    by_comfyui: Callable[..., Weights],
    tmp_path: Path,
) -> None:
    file = write_lora(tmp_path / "l.safetensors", layers_of(shapes, kind, dora=dora), "ai-toolkit with alpha")
    found = match(open_lora(file), shapes)
    assert found.unmatched_keys == 0
    ours = change_all(weights, (found, strength))
    assert_same(ours, by_comfyui(file, strength, weights))
    assert all((ours[name] - weights[name]).abs().max() > 0.01 for name in ours)


def test_a_dora_scale_of_one_dimension_is_that_of_the_rows_which_comfyui_leaves_out(
    weights: Weights, shapes: dict[str, tuple[int, ...]], by_comfyui: Callable[..., Weights], tmp_path: Path
) -> None:
    name = f"{BLOCK}0.img_mlp.net.0.proj"
    assert shapes[f"{name}.weight"][0] != shapes[f"{name}.weight"][1]
    parts = make_parts("lora", shapes[f"{name}.weight"], dora="rows") | {"alpha": torch.tensor(2.0)}
    rows = write_lora(tmp_path / "rows.safetensors", {name: parts}, "ai-toolkit with alpha")
    parts["dora_scale"] = parts["dora_scale"].flatten()
    flat = write_lora(tmp_path / "flat.safetensors", {name: parts}, "ai-toolkit with alpha")
    ours = change_all(weights, (match(open_lora(flat), shapes), 1.0))
    assert_same(ours, change_all(weights, (match(open_lora(rows), shapes), 1.0)))
    assert (ours[f"{name}.weight"] - weights[f"{name}.weight"]).abs().max() > 0.01
    assert torch.equal(by_comfyui(flat, 1.0, weights)[f"{name}.weight"], weights[f"{name}.weight"])


def test_differences_of_weights_norms_and_biases_are_what_comfyui_adds(
    weights: Weights, shapes: dict[str, tuple[int, ...]], by_comfyui: Callable[..., Weights], tmp_path: Path
) -> None:
    prefix = "diffusion_model."
    generator = torch.Generator().manual_seed(0)
    names = {
        "img_in.diff": "img_in.weight",
        "img_in.diff_b": "img_in.bias",
        f"{TO_Q}.diff_b": f"{TO_Q}.bias",
        f"{BLOCK}1.attn.norm_q.diff": f"{BLOCK}1.attn.norm_q.weight",
        "txt_norm.w_norm": "txt_norm.weight",
    }
    save_file(
        {prefix + key: torch.randn(shapes[name], generator=generator) for key, name in names.items()},
        tmp_path / "l.safetensors",
    )
    found = match(open_lora(tmp_path / "l.safetensors"), shapes)
    assert set(found.deltas) == set(names.values())
    ours = change_all(weights, (found, -0.5))
    assert_same(ours, by_comfyui(tmp_path / "l.safetensors", -0.5, weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_any_dtype_are_taken_as_what_they_store(
    kind: str, dtype: torch.dtype, weights: Weights, shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    layers = {"img_in": make_parts(kind, shapes["img_in.weight"], dora="rows" if kind != "diff" else None)}
    wide = {"img_in": {name: part.to(dtype).float() for name, part in layers["img_in"].items()}}
    narrow_file = write_lora(tmp_path / "narrow.safetensors", layers, dtype=dtype)
    wide_file = write_lora(tmp_path / "wide.safetensors", wide)
    narrow, wide_found = (match(open_lora(file), shapes) for file in (narrow_file, wide_file))
    ours = change_all(weights, (narrow, 0.7))
    assert_same(ours, change_all(weights, (wide_found, 0.7)))


def peft_adapter(transformer: Any, folder: Path, **options: Any) -> Any:
    """A copy of the transformer with one PEFT adapter of random matrices; its file is written by diffusers."""
    from peft import LoraConfig

    model = copy.deepcopy(transformer)
    targets = ["to_q", "to_out.0", "img_mod.1", "net.2"]
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=targets, **options))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
    model.save_lora_adapter(folder, adapter_name="default")
    return model


PEFT_OPTIONS: dict[str, tuple[dict[str, Any], tuple[float, float] | None]] = {  # and the scales that ComfyUI leaves out
    "alpha": ({"lora_alpha": 6}, (1.5, 1.5)),
    "alpha of the rank": ({"lora_alpha": 4}, None),
    "rsLoRA": ({"lora_alpha": 6, "use_rslora": True}, (3.0, 3.0)),
    "bias": ({"lora_alpha": 6, "lora_bias": True}, (1.5, 1.5)),
    "DoRA": ({"lora_alpha": 4, "use_dora": True}, None),
    "alphas of their own": (
        {"lora_alpha": 6, "alpha_pattern": {"attn.to_q": 3, f"{BLOCK}1.img_mod.1": 7}},
        (0.75, 1.75),
    ),
}


def by_peft(model: Any) -> Weights:
    """The weights and biases that PEFT itself makes."""
    merged = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            module.merge()
            merged[f"{name}.weight"] = module.base_layer.weight.detach()
            if any(branch.bias is not None for branch in module.lora_B.values()):
                merged[f"{name}.bias"] = module.base_layer.bias.detach()
    return merged


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # of PEFT's own biases, which it takes for damaged matrices
@pytest.mark.parametrize(("options", "scales"), PEFT_OPTIONS.values(), ids=PEFT_OPTIONS.keys())
def test_what_diffusers_saves_of_a_peft_adapter_is_peft_s_own_change_but_for_the_scale_that_is_told(
    options: dict[str, Any],
    scales: tuple[float, float] | None,
    weights: Weights,
    shapes: dict[str, tuple[int, ...]],
    tiny: Callable[..., tuple[Any, Path]],
    tmp_path: Path,
) -> None:
    model = peft_adapter(tiny()[0], tmp_path, **options)
    (file,) = tmp_path.glob("*.safetensors")
    found = match(open_lora(file), shapes)
    assert (found.unmatched_keys, found.left_out_scales) == (0, scales)
    least, most = scales or (1.0, 1.0)
    merged = by_peft(model)
    if least == most:
        assert_same(change_all(weights, (found, least)), merged)
        return
    ours = {scale: change_all(weights, (found, scale)) for scale in (least, 1.5, most)}
    for name, expected in merged.items():
        scale = least if ".attn.to_q." in name else most if name == f"{BLOCK}1.img_mod.1.weight" else 1.5
        assert_same({name: ours[scale][name]}, {name: expected})


def test_alphas_in_the_metadata_alone_are_left_out_as_comfyui_leaves_them(
    weights: Weights,
    shapes: dict[str, tuple[int, ...]],
    by_comfyui: Callable[..., Weights],
    tiny: Callable[..., tuple[Any, Path]],
    tmp_path: Path,
) -> None:
    peft_adapter(tiny()[0], tmp_path, lora_alpha=6)
    (file,) = tmp_path.glob("*.safetensors")
    assert_same(change_all(weights, (match(open_lora(file), shapes), 0.7)), by_comfyui(file, 0.7, weights))


# stacks


def test_stacked_files_add_up_in_their_order(
    weights: Weights, shapes: dict[str, tuple[int, ...]], by_comfyui: Callable[..., Weights], tmp_path: Path
) -> None:
    kinds = [("lora", None), ("lokr", "columns"), ("loha", "rows"), ("lora", "columns"), ("diff", None)]
    strengths = [0.7, -0.4, 1.0, 1.2, -1.0]
    files = [
        write_lora(tmp_path / f"{i}.safetensors", layers_of(shapes, kind, dora=dora), "ai-toolkit")
        for i, (kind, dora) in enumerate(kinds)
    ]
    stack = [(match(open_lora(file), shapes), strength) for file, strength in zip(files, strengths, strict=True)]
    expected = {name: weights[name] for name in stack[0][0].deltas}
    for file, strength in zip(files, strengths, strict=True):
        expected = by_comfyui(file, strength, expected)
    ours = change_all(weights, *stack)
    assert_same(ours, expected, 4e-6)
    swapped = change_all(weights, stack[1], stack[0], *stack[2:])
    assert (swapped["img_in.weight"] - ours["img_in.weight"]).abs().max() > 1e-3


def test_a_stack_is_rounded_once(tmp_path: Path) -> None:
    # between 256 and 512 bf16 knows even numbers only: one at a time, all three would be lost
    ones = {"up": torch.ones(8, 1), "down": torch.ones(1, 16)}
    file = write_lora(tmp_path / "l.safetensors", {"img_in": ones})
    delta = match(open_lora(file), {"img_in.weight": (8, 16)}).deltas["img_in.weight"]
    weight = torch.full((8, 16), 256.0, dtype=torch.bfloat16)
    changed = change(weight, (delta, 0.75), (delta, 0.75), (delta, 0.75))
    assert torch.equal(changed, torch.full_like(weight, 258))
    assert torch.equal(change(weight, (delta, 0.75)), weight)


def test_a_lora_taken_back_leaves_the_weight_as_it_was(tmp_path: Path) -> None:
    parts = make_parts("lora", (24, 40))
    file = write_lora(tmp_path / "l.safetensors", {"img_in": parts})
    delta = match(open_lora(file), {"img_in.weight": (24, 40)}).deltas["img_in.weight"]
    weight = torch.randn(24, 40).bfloat16()
    assert torch.equal(change(weight, (delta, 1.5), (delta, -1.5)), weight)


def test_strength_zero_changes_nothing_and_needs_no_scratch(tmp_path: Path) -> None:
    file = write_lora(tmp_path / "l.safetensors", {"img_in": make_parts("lora", (24, 40), dora="columns")})
    delta = match(open_lora(file), {"img_in.weight": (24, 40)}).deltas["img_in.weight"]
    weight = torch.randn(24, 40).bfloat16()
    before = weight.clone()
    parts = [torch.full(part.shape, float("nan")) for part in delta.parts]
    apply(weight, [(delta, parts, 0.0)], torch.empty(scratch_elements(weight.shape, [])))
    assert torch.equal(weight, before)


# runs of rows


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_runs_of_rows_leave_no_seam(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    stack = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(KINDS),
                st.sampled_from([None, *DORA]),
                st.integers(1, 9),
                st.floats(-2, 2, width=16).filter(lambda strength: strength != 0),
                st.sampled_from([torch.float32, torch.bfloat16]),
            ),
            min_size=1,
            max_size=3,
        )
    )
    chunk = data.draw(st.integers(1, rows * columns + 5))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    expected, deltas = weight.double(), []
    folder = tmp_path_factory.mktemp("lora")
    for i, (kind, dora, rank, strength, dtype) in enumerate(stack):
        parts = make_parts(kind, (rows, columns), rank=rank, seed=i, dora=None if kind == "diff" else dora)
        parts = {name: part.to(dtype) for name, part in parts.items()}
        file = write_lora(folder / f"{i}.safetensors", {"img_in": parts}, dtype=dtype)
        deltas.append((match(open_lora(file), {"img_in.weight": (rows, columns)}).deltas["img_in.weight"], strength))
        expected = changed_at_once(expected, parts, strength)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_deltas, "CHUNK_WEIGHTS", chunk)
        changed = change(weight, *deltas)
    assert (changed - expected).abs().max() <= 2e-4 * max(1.0, float(expected.abs().max()))


def changed_at_once(weight: torch.Tensor, parts: Parts, strength: float) -> torch.Tensor:
    """In fp64, as ComfyUI defines it."""
    merged = weight + change_of(parts)
    magnitude = parts.get("dora_scale")
    if magnitude is not None:
        per_row = magnitude.shape == (len(weight), 1)
        norm = weight.norm(dim=1, keepdim=True) if per_row else merged.norm(dim=0, keepdim=True)
        merged = merged * (magnitude.double() / (norm + torch.finfo(torch.float32).eps))
    return weight + strength * (merged - weight)


@pytest.mark.slow
def test_a_weight_of_the_real_size_has_no_seam(tmp_path: Path) -> None:
    rows, columns = 12288 // 4, 3072  # more than four runs of rows
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    stack = [("lora", None, 0.8), ("lokr, inner product", None, -0.5), ("loha", "columns", 0.6)]
    expected, deltas = weight.double(), []
    for i, (kind, dora, strength) in enumerate(stack):
        parts = {k: p.bfloat16() for k, p in make_parts(kind, (rows, columns), rank=16, seed=i, dora=dora).items()}
        file = write_lora(tmp_path / f"{i}.safetensors", {"img_in": parts}, dtype=torch.bfloat16)
        deltas.append((match(open_lora(file), {"img_in.weight": (rows, columns)}).deltas["img_in.weight"], strength))
        expected = changed_at_once(expected, parts, strength)
    assert rows * columns > 4 * lora_deltas.CHUNK_WEIGHTS
    changed = change(weight, *deltas)
    # of a bf16 number's last place, and a little for fp32
    step = torch.finfo(torch.bfloat16).eps / 2 * 1.001
    assert ((changed.double() - expected).abs() <= expected.abs() * step + 1e-5).all()


# memory

MEMORY_KINDS = [(kind, dora) for kind in KINDS for dora in ((None,) if kind == "diff" else (None, *DORA))]
every_kind = pytest.mark.parametrize(("kind", "dora"), MEMORY_KINDS, ids=str)


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_is_allocated_beside_the_scratch(
    kind: str, dora: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    rows, columns = 3072, 1024
    parts = make_parts(kind, (rows, columns), rank=16, dora=dora)
    file = write_lora(tmp_path / "l.safetensors", {"img_in": parts}, dtype=dtype)
    delta = match(open_lora(file), {"img_in.weight": (rows, columns)}).deltas["img_in.weight"]
    weight, stored = torch.randn(rows, columns).bfloat16(), [read(part) for part in delta.parts]
    stack = [(delta, stored, 0.7), (delta, stored, -0.2)]
    scratch = torch.empty(scratch_elements(weight.shape, [delta, delta]))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        apply(weight, stack, scratch)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = sum(event.nbytes() for event in events if event.nbytes() > 0)
    # reductions and factors take a few numbers
    assert allocated <= 4096
    with LiveBytes("cpu") as live:
        seen = [tensor.view(-1) for tensor in (weight, scratch, *stored)]
        before = live.now
        apply(weight, stack, scratch)
        assert live.peak == before, len(seen)


FULL_SIZE = (12288, 3072)


@every_kind
def test_a_full_size_weights_scratch_is_a_fraction_of_it(kind: str, dora: str | None) -> None:
    with FakeTensorMode():
        elements = scratch_elements(FULL_SIZE, [fake_delta(kind, dora, FULL_SIZE, rank=64)] * 2)
    # a LoRA takes its matrices and a run of rows; nothing takes the whole weight, which has 37.7 M
    limits = {"lora": 2.4e6, "diff": 4.3e6, "loha": 7e6}
    assert elements < limits.get(kind, 5e6) + (0 if dora is None else 2.2e6)


@pytest.mark.slow  # that each kind's DoRA keeps to its scratch, a smaller weight has shown above
@pytest.mark.parametrize(
    ("kind", "dora"), [(kind, None) for kind in KINDS] + [("lora", "columns"), ("lokr", "columns")], ids=str
)
def test_a_full_size_weight_takes_no_more_than_its_scratch_on_a_gpu(
    kind: str, dora: str | None, tmp_path: Path
) -> None:
    shape, dtype = FULL_SIZE, torch.bfloat16
    with FakeTensorMode():
        delta = fake_delta(kind, dora, shape, rank=64)
        weight = torch.empty(shape, dtype=dtype, device="cuda")
        stored = [torch.empty(part.shape, dtype=dtype, device="cuda") for part in delta.parts]
        scratch = torch.empty(scratch_elements(shape, [delta] * 2), device="cuda")
        with LiveBytes("cuda") as live:
            seen = [tensor.view(-1) for tensor in (weight, scratch, *stored)]
            before = live.now
            apply(weight, [(delta, stored, strength) for strength in (1.0, -0.3)], scratch)
            assert live.peak == before, len(seen)


def fake_delta(kind: str, dora: str | None, shape: tuple[int, int], rank: int) -> Delta:
    parts = make_parts(kind, shape, rank=rank, dora=dora)
    entries = {
        STYLES["ai-toolkit"].key("img_in", name): TensorEntry(Path("l"), 0, 2 * part.numel(), "BF16", tuple(part.shape))
        for name, part in parts.items()
    }
    return match(LoraFile(Path("l"), entries, {}, ""), {"img_in.weight": shape}).deltas["img_in.weight"]


def test_more_scratch_changes_no_bit(tmp_path: Path) -> None:
    weight = torch.randn(3000, 1000, generator=torch.Generator().manual_seed(0))
    file = write_lora(tmp_path / "l.safetensors", {"img_in": make_parts("lora", (3000, 1000), rank=16)})
    delta = match(open_lora(file), {"img_in.weight": (3000, 1000)}).deltas["img_in.weight"]
    roomy = weight.clone()
    apply(roomy, [(delta, [read(part) for part in delta.parts], 0.7)], torch.empty(10_000_000))
    assert torch.equal(roomy, change(weight, (delta, 0.7)))


@pytest.mark.parametrize(
    "wrong", ["too little scratch", "scratch in bf16", "another weight", "a part too few", "strength nan"]
)
def test_what_does_not_belong_together_is_refused(wrong: str, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "l.safetensors", {"img_in": make_parts("lora", (24, 40))}, dtype=torch.bfloat16)
    delta = match(open_lora(file), {"img_in.weight": (24, 40)}).deltas["img_in.weight"]
    needed = scratch_elements((24, 40), [delta])
    assert needed == 24 * 40 + 4 * (24 + 40)
    weight, parts = torch.zeros(24, 40), [read(part) for part in delta.parts]
    scratch, strength = torch.empty(needed), 1.0
    if wrong == "too little scratch":
        scratch = torch.empty(needed - 1)
    elif wrong == "scratch in bf16":
        scratch = scratch.bfloat16()
    elif wrong == "another weight":
        weight = torch.zeros(40, 24)
    elif wrong == "a part too few":
        parts.pop()
    else:
        strength = float("nan")
    with pytest.raises(InvalidRequest, match=r"needs (scratch space for 1216|a weight of \[24, 40\], 2 parts)"):
        apply(weight, [(delta, parts, strength)], scratch)
    assert not weight.any()


# files


def test_unmatched_keys_are_counted_and_named(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    tensors = {f"transformer.{TO_Q}.lora_A.weight": torch.zeros(2, shapes[f"{TO_Q}.weight"][1])}
    tensors[f"transformer.{TO_Q}.lora_B.weight"] = torch.zeros(shapes[f"{TO_Q}.weight"][0], 2)
    others = {
        "text_encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 8),
        f"{BLOCK}99.attn.to_q.lora_A.weight": torch.zeros(2, 64),
        f"{BLOCK}1.attn.to_q.alpha": torch.tensor(4.0),  # of no matrix
        "txt_norm.diff_b": torch.zeros(32),  # of a bias that the model has not
        f"{TO_Q}.network_version": torch.tensor(1.0),
    }
    save_file(tensors | others, tmp_path / "l.safetensors")
    found = match(open_lora(tmp_path / "l.safetensors"), shapes)
    assert (found.matched_keys, found.unmatched_keys, set(found.unmatched)) == (2, 5, set(others))
    assert str(found) == "2 of 7 keys of l.safetensors are used; they change 1 weight."
    assert found.nbytes == 4 * 2 * sum(shapes[f"{TO_Q}.weight"])


OTHER_MODELS = {
    "Flux": "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "SDXL": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
    "Stable Diffusion 3": "transformer.joint_blocks.0.x_block.attn.qkv.lora_A.weight",
    "Wan": "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
    "Z-Image": "diffusion_model.layers.3.attention.to_q.lora_A.weight",
    "a text encoder": "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "another size": f"{BLOCK}40.attn.to_q.lora_A.weight",
    "another size or kind": f"controlnet.{TO_Q}.lora_A.weight",
    "Stable Diffusion 1.5 or SDXL": "student.down_blocks.1.attentions.0.proj_out.lora_A.weight",
}


@pytest.mark.parametrize(("model", "key"), OTHER_MODELS.items(), ids=OTHER_MODELS.keys())
def test_a_lora_for_another_model_is_refused_by_that_models_name(
    model: str, key: str, shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    save_file({key: torch.zeros(2, 64)}, tmp_path / "l.safetensors")
    with pytest.raises(WrongModel, match=rf"1 of its 1 keys fit no layer .*made for .*{model}.*for Qwen-Image"):
        match(open_lora(tmp_path / "l.safetensors"), shapes)


def test_a_flux_lora_is_refused_although_half_of_its_layers_fit(
    shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    # both models are 3072 wide, and diffusers gives some of their layers the same names
    names = (TO_Q, "single_transformer_blocks.0.attn.to_q")
    layers = {name: make_parts("lora", shapes[f"{TO_Q}.weight"]) for name in names}
    file = write_lora(tmp_path / "l.safetensors", layers, "diffusers")
    with pytest.raises(WrongModel, match=r"2 of its 4 keys .* Flux"):
        match(open_lora(file), shapes)


def test_a_whole_model_is_no_lora(tiny: Callable[..., tuple[Any, Path]], shapes: dict[str, tuple[int, ...]]) -> None:
    (file,) = tiny()[1].glob("*.safetensors")
    with pytest.raises(WrongModel, match="is not a LoRA: none of its"):
        match(open_lora(file), shapes)


def test_a_file_without_tensors_is_no_lora(
    shapes: dict[str, tuple[int, ...]], write_header: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(WrongModel, match="is not a LoRA: none of its 0 keys"):
        match(open_lora(write_header(tmp_path / "l.safetensors", {}, 0)), shapes)


WIDTH = 64
BAD_FILES: dict[str, tuple[dict[str, torch.Tensor], type[Exception], str]] = {
    "another width": (
        {".lora_A.weight": torch.zeros(2, 48), ".lora_B.weight": torch.zeros(WIDTH, 2)},
        WrongModel,
        rf"to_q.weight by a matrix of \[64, 48\]; this model's is \[{WIDTH}, {WIDTH}\]",
    ),
    "a part is missing": ({".lora_A.weight": torch.zeros(2, WIDTH)}, DamagedFile, r"to_q.lora_A.weight'.*part 'up'"),
    "no rank": (
        {".lora_A.weight": torch.zeros(0, WIDTH), ".lora_B.weight": torch.zeros(WIDTH, 0)},
        DamagedFile,
        "all of its 1 layers have rank 0",
    ),
    "two ranks": (
        {".lora_A.weight": torch.zeros(2, WIDTH), ".lora_B.weight": torch.zeros(WIDTH, 3)},
        DamagedFile,
        "cannot be multiplied",
    ),
    "int8": (
        {".lora_A.weight": torch.zeros(2, WIDTH, dtype=torch.int8), ".lora_B.weight": torch.zeros(WIDTH, 2)},
        Unsupported,
        "stored as I8",
    ),
    "the same part twice": (
        {".lora_A.weight": torch.zeros(2, WIDTH), ".lora_down.weight": torch.zeros(2, WIDTH)},
        DamagedFile,
        "the same part twice",
    ),
    "two changes at once": (
        {
            ".lora_A.weight": torch.zeros(2, WIDTH),
            ".lora_B.weight": torch.zeros(WIDTH, 2),
            ".diff": torch.zeros(WIDTH, WIDTH),
        },
        Unsupported,
        "two ways at once",
    ),
    "an alpha that is no number": (
        {
            ".lora_A.weight": torch.zeros(2, WIDTH),
            ".lora_B.weight": torch.zeros(WIDTH, 2),
            ".alpha": torch.tensor(float("nan")),
        },
        DamagedFile,
        "alpha' is nan",
    ),
    "an alpha of many numbers": (
        {
            ".lora_A.weight": torch.zeros(2, WIDTH),
            ".lora_B.weight": torch.zeros(WIDTH, 2),
            ".alpha": torch.ones(WIDTH),
        },
        DamagedFile,
        "not one number",
    ),
    "magnitudes of another count": (
        {
            ".lora_A.weight": torch.zeros(2, WIDTH),
            ".lora_B.weight": torch.zeros(WIDTH, 2),
            ".dora_scale": torch.zeros(1, 63),
        },
        DamagedFile,
        r"\[1, 63\], which fits neither the rows nor the columns of 64x64",
    ),
    "LoHa of two shapes": (
        {
            ".hada_w1_a": torch.zeros(WIDTH, 2),
            ".hada_w1_b": torch.zeros(2, WIDTH),
            ".hada_w2_a": torch.zeros(WIDTH, 2),
            ".hada_w2_b": torch.zeros(2, 32),
        },
        DamagedFile,
        "its second product",
    ),
}
KINDS_REFUSED = {
    ".set_weight": "takes the model's place",
    ".oft_blocks": "OFT or BOFT",
    ".oft_R.weight": "OFT or BOFT",
    ".rescale": "OFT or BOFT",
    ".a1.weight": "GLoRA",
    ".lora_mid.weight": "Tucker",
    ".hada_t1": "Tucker",
    ".lokr_t2": "Tucker",
    ".reshape_weight": "a weight's shape",
    ".lora_A.weight_scale": "a quantized LoRA",
    ".lora_down.weight.absmax": "a quantized LoRA",
    ".magnitude": "DoRA with a key",
}
BAD_FILES |= {
    f"{suffix}": ({suffix: torch.zeros(2, 2), ".lora_B.weight": torch.zeros(WIDTH, 2)}, Unsupported, words)
    for suffix, words in KINDS_REFUSED.items()
}


@pytest.mark.parametrize(("parts", "error", "words"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_what_cannot_be_computed_is_refused_with_the_reason(
    parts: dict[str, torch.Tensor],
    error: type[Exception],
    words: str,
    shapes: dict[str, tuple[int, ...]],
    tmp_path: Path,
) -> None:
    assert shapes[f"{TO_Q}.weight"] == (WIDTH, WIDTH)
    file = tmp_path / "l.safetensors"
    save_file({f"diffusion_model.{TO_Q}{suffix}": tensor for suffix, tensor in parts.items()}, file)
    with pytest.raises(error, match=words) as caught:
        match(open_lora(file), shapes)
    assert str(file) in str(caught.value)


@pytest.mark.slow
@given(key=st.text(max_size=40) | st.from_regex(r"(diffusion_model\.|lycoris_)?[a-z_.0]{0,20}\.lora_[AB](\.\w+)*"))
def test_a_key_that_is_no_layers_never_matches(key: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = open_lora(
        write_lora(tmp_path_factory.getbasetemp() / "l.safetensors", {"img_in": make_parts("lora", (4, 4))})
    )
    entry = next(iter(found.tensors.values()))
    odd = type(found)(found.path, {key: entry}, {}, "")
    with pytest.raises((WrongModel, DamagedFile)):
        match(odd, {"img_in.weight": (4, 4)})


def test_damaged_settings_are_refused(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    parts = make_parts("lora", shapes["img_in.weight"])
    file = write_lora(tmp_path / "l.safetensors", {"img_in": parts}, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(DamagedFile, match="lora_adapter_metadata"):
        match(open_lora(file), shapes)


def test_a_file_that_is_gone_is_missing(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    parts = make_parts("lora", shapes["img_in.weight"]) | {"alpha": torch.tensor(1.0)}
    file = write_lora(tmp_path / "l.safetensors", {"img_in": parts}, "Lightning")
    lora = open_lora(file)
    file.unlink()
    with pytest.raises(MissingFile):
        match(lora, shapes)
    with pytest.raises(MissingFile):
        open_lora(file)


def test_the_identity_changes_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "l.safetensors"
    identities = set()
    for rank in (2, 3):
        write_lora(file, {"img_in": make_parts("lora", (8, 8), rank=rank)})
        identities.add(open_lora(file).identity)
    assert len(identities) == 2
