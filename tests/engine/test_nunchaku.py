"""nunchaku's files decode to the formula of their layers, and whole models compute with those weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import full_size
import pytest
import torch
from full_size_run import once_a_shape, require_planned_peaks
from nunchaku_files import SHIFT, SvdqLayer, awq, pack_scales, svdq, write_nunchaku_transformer
from qwenimage_lowvram.engine.caches.requantized_weights import RequantizedWeights
from qwenimage_lowvram.engine.compute import svdquant_products
from qwenimage_lowvram.engine.compute.linear_choice import Computing, LinearChoice
from qwenimage_lowvram.engine.errors import DamagedFile, InvalidRequest, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from qwenimage_lowvram.engine.formats import CODECS, stored_param
from qwenimage_lowvram.engine.formats.nunchaku import SVDQ
from qwenimage_lowvram.engine.formats.nunchaku_layers import with_nunchaku_layers
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.lora_file import match, open_lora
from qwenimage_lowvram.engine.lora.weight_patches import lora_patches
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.component import TRANSFORMER
from qwenimage_lowvram.engine.models.qwen_image.tensors import sort_transformer
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.recognition import require
from qwenimage_lowvram.engine.streaming import read_params
from safetensors.torch import load_file, save_file
from small_checkpoint import make_transformer

DIM = 3072
# layers of Qwen-Image: name, rows, columns
REAL = {
    "attn.to_qkv": (3 * DIM, DIM),
    "attn.add_qkv_proj": (3 * DIM, DIM),
    "attn.to_out.0": (DIM, DIM),
    "img_mlp.net.0.proj": (4 * DIM, DIM),
    "txt_mlp.net.2": (DIM, 4 * DIM),
}
PARTS_OF = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.float() - reference.float()).norm() / reference.float().norm())


def random_layer(rows: int, columns: int, rank: int, precision: str) -> SvdqLayer:
    """Any numbers that a file may hold: the codes of real layers take minutes to find."""
    generator = torch.Generator().manual_seed(rows + columns + rank)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    smooth = (torch.rand(columns, generator=generator) + 0.5).bfloat16()
    down, up = numbers(rank, columns) / 50, numbers(rows, rank) / 10
    if precision == "int4":
        codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
        return SvdqLayer(codes, numbers(rows, columns // 64).abs() / 100, smooth, down, up)
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[torch.randint(0, 8, (rows, columns), generator=generator)]
    codes *= torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1
    scales = (torch.rand(rows, columns // 16, generator=generator) * 400).to(torch.float8_e4m3fn)
    by_row = (torch.rand(rows, generator=generator) + 0.5).bfloat16()
    return SvdqLayer(codes, scales, smooth, down, up, by_row, 1e-5)


def saved(folder: Path, layer: str, parts: dict[str, torch.Tensor]) -> Checkpoint:
    save_file({f"{layer}.{part}": value.contiguous() for part, value in parts.items()}, folder / "layer.safetensors")
    return open_checkpoint(folder / "layer.safetensors")


def decoded(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return read_params(with_nunchaku_layers(checkpoint.tensors), shapes, dtype, "layer")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rank"), [("int4", 32), ("int4", 128), ("fp4", 32)])
@pytest.mark.parametrize("name", REAL)
def test_a_layer_of_the_real_shape_computes_the_formula(name: str, rank: int, precision: str, tmp_path: Path) -> None:
    rows, columns = REAL[name]
    layer = random_layer(rows, columns, rank, precision)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(1)).bfloat16()
    parts = {**layer.packed(), "bias": pack_scales(bias[:, None]).view(-1)}
    names = PARTS_OF.get(name, (name,))
    shapes: dict[str, tuple[int, ...]] = {}
    for part in names:
        shapes |= {f"{part}.weight": (rows // len(names), columns), f"{part}.bias": (rows // len(names),)}
    weights = decoded(saved(tmp_path, name, parts), shapes, torch.float32)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(2))
    ours = torch.cat([torch.nn.functional.linear(x, weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in names], 1)
    shift = SHIFT if name.endswith("net.2") and precision == "int4" else 0.0
    assert relative(ours, layer.output(x, bias.float(), shift)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["int4", "fp4"])
def test_the_compute_dtype_is_reached_in_one_rounding(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    layer = random_layer(512, 4096, 32, precision)
    checkpoint = saved(tmp_path, "attn.to_out.0", layer.packed())
    exact, rounded = (
        decoded(checkpoint, {"attn.to_out.0.weight": (512, 4096)}, to)["attn.to_out.0.weight"]
        for to in (torch.float32, dtype)
    )
    assert torch.equal(rounded, exact.to(dtype))
    assert relative(exact, layer.weight()) < 1e-6


@pytest.mark.slow
def test_modulation_of_the_real_shape_is_in_diffusers_order(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6 * DIM, DIM, generator=generator) / 50
    bias = torch.randn(6 * DIM, generator=generator)
    parts, meant, meant_bias = awq(weight, bias)
    shapes = {"img_mod.1.weight": (6 * DIM, DIM), "img_mod.1.bias": (6 * DIM,)}
    weights = decoded(saved(tmp_path, "img_mod.1", parts), shapes, torch.float32)
    assert relative(weights["img_mod.1.weight"], meant) < 1e-6
    assert torch.equal(weights["img_mod.1.bias"], meant_bias)
    assert relative(meant, weight) < 0.12
    assert relative(meant_bias, bias) < 0.01


@pytest.mark.parametrize(("precision", "most"), [("int4", 0.14), ("fp4", 0.14)])
def test_a_quantized_weight_comes_back_within_the_formats_error(precision: str, most: float, tmp_path: Path) -> None:
    weight = torch.randn(384, 512, generator=torch.Generator().manual_seed(0)) / 20
    layer = svdq(weight, 32, precision)
    checkpoint = saved(tmp_path, "attn.to_out.0", layer.packed())
    ours = decoded(checkpoint, {"attn.to_out.0.weight": (384, 512)}, torch.float32)["attn.to_out.0.weight"]
    assert relative(ours, weight) < most


CODEC_SHAPES = [("SVDQ_INT4_R32", (3072, 12288)), ("SVDQ_INT4_R128", (3072, 12288)), ("SVDQ_FP4_R128", (12288, 3072))]


# whole models


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Any, Path]]:
    """`written(precision, rank)` -> diffusers' transformer with the weights that a file stands for, and the file."""
    made: dict[tuple[str, int], tuple[Any, Path]] = {}

    def make(precision: str, rank: int) -> tuple[Any, Path]:
        if (precision, rank) not in made:
            model = make_transformer(layers=2, head_dim=64, text_dim=32)
            file = tmp_path_factory.mktemp("nunchaku") / f"svdq-{precision}_r{rank}-qwen-image.safetensors"
            config = dict(model.config)
            model.load_state_dict(
                write_nunchaku_transformer(file, model.state_dict(), config, rank=rank, precision=precision)
            )
            made[precision, rank] = model, file
        return made[precision, rank]

    return make


def a_branch() -> Branch:
    generator = torch.Generator().manual_seed(0)
    tokens, prompt = torch.randn(1, 30, 64, generator=generator), torch.randn(1, 9, 32, generator=generator)
    return Branch(tokens, ((1, 5, 6),), prompt, None, 0.7)


@torch.no_grad()
def computed(model: Any) -> torch.Tensor:
    """What diffusers' transformer makes of `a_branch`."""
    branch = a_branch()
    return model(
        hidden_states=branch.tokens,
        encoder_hidden_states=branch.prompt_embeds,
        timestep=torch.tensor([branch.timestep]),
        img_shapes=[list(branch.shapes)],
        return_dict=False,
    )[0]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("resident", [(), (0, 1)])
@pytest.mark.parametrize(("precision", "rank"), [("int4", 32), ("int4", 128), ("fp4", 32)])
def test_a_transformer_computes_what_diffusers_does_with_the_formulas_weights(
    written: Callable[[str, int], tuple[Any, Path]],
    hardware: Hardware,
    precision: str,
    rank: int,
    resident: tuple[int, ...],
) -> None:
    model, file = written(precision, rank)
    expected = computed(model)
    transformer = QwenImageTransformer(open_checkpoint(file), dtype=torch.float32, hardware=hardware)
    assert {param.codec for block in transformer.store.blocks for param in block.params} == {
        f"svdq_{precision}_r{rank}", "svdq_bias", "bf16", *(["svdq_shifted_bias"] if precision == "int4" else []),
    }  # fmt: skip
    transformer.load(resident)
    with transformer.session(slots=2) as session:
        assert relative(session.forward([a_branch()])[0], expected) < 1e-5


@pytest.mark.parametrize(("rank", "most"), [(32, 1.03), (128, 1.1)])
def test_a_layer_is_streamed_in_the_files_own_size(rank: int, most: float) -> None:
    shapes = {
        "qweight": ("I8", (3 * DIM, DIM // 2)), "wscales": ("BF16", (DIM // 64, 3 * DIM)),
        "smooth_factor": ("BF16", (DIM,)), "proj_down": ("BF16", (DIM, rank)), "proj_up": ("BF16", (3 * DIM, rank)),
    }  # fmt: skip
    tensors = {
        f"attn.to_qkv.{part}": TensorEntry(Path(), 0, prod(shape) * (1 if dtype == "I8" else 2), dtype, shape)
        for part, (dtype, shape) in shapes.items()
    }
    described = with_nunchaku_layers(tensors)
    streamed = sum(stored_param(f"{name}.weight", described, "").nbytes for name in PARTS_OF["attn.to_qkv"])
    stored = sum(entry.nbytes for entry in tensors.values())
    assert stored <= streamed < most * stored


@pytest.mark.slow
@torch.no_grad()
def test_a_shifted_bias_is_of_the_files_weight_with_a_lora_on_it(
    written: Callable[[str, int], tuple[Any, Path]], tmp_path: Path, hardware: Hardware
) -> None:
    model, file = written("int4", 32)
    generator = torch.Generator().manual_seed(0)
    lora, merged = {}, {name: value.clone() for name, value in model.state_dict().items()}
    for layer in [f"transformer_blocks.{i}.{s}_mlp.net.2" for i in range(2) for s in ("img", "txt")]:
        rows, columns = merged[f"{layer}.weight"].shape
        up, down = (torch.randn(shape, generator=generator) / 8 for shape in ((rows, 4), (4, columns)))
        lora |= {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}
        merged[f"{layer}.weight"] += up @ down
    save_file(lora, tmp_path / "lora.safetensors")
    changed_model = make_transformer(layers=2, head_dim=64, text_dim=32)
    changed_model.load_state_dict(merged)
    transformer = QwenImageTransformer(open_checkpoint(file), dtype=torch.float32, hardware=hardware)
    transformer.patch(lora_patches([(match(open_lora(tmp_path / "lora.safetensors"), transformer.weights), 1.0)]))
    with transformer.session(slots=2) as session:
        ours = session.forward([a_branch()])[0]
    assert relative(ours, computed(changed_model)) < 1e-5


def test_a_file_of_nunchakus_is_a_transformer_and_its_quantization_is_kept(
    written: Callable[[str, int], tuple[Any, Path]], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(written("int4", 32)[1])
    require(checkpoint, TRANSFORMER)
    with pytest.raises(InvalidRequest, match=r"is quantized already \(svdq_int4_r32\)"):
        RequantizedWeights.of(checkpoint, "nf4", tmp_path)


# the plan


def in_nunchakus_form(checkpoint: Checkpoint, rank: int) -> Checkpoint:
    """The header that nunchaku's file of the checkpoint has."""
    tensors: dict[str, TensorEntry] = {}

    def add(name: str, dtype: str, *shape: int) -> None:
        nbytes = prod(shape) * {"BF16": 2, "I8": 1, "I32": 4}[dtype]
        tensors[name] = TensorEntry(checkpoint.path, 0, nbytes, dtype, shape)

    fused = {part: (layer, names) for layer, names in PARTS_OF.items() for part in names}
    for name, entry in checkpoint.tensors.items():
        head, _, rest = name.removeprefix("transformer_blocks.").partition(".")
        layer, _, kind = rest.rpartition(".")
        if not name.startswith("transformer_blocks.") or "norm" in layer:
            tensors[name] = entry
            continue
        layer, names = fused.get(layer, (layer, (layer,)))
        start = f"transformer_blocks.{head}.{layer}."
        rows = entry.shape[0] * len(names)
        if kind == "bias":
            add(f"{start}bias", "BF16", rows)
        elif "_mod." in layer:
            add(f"{start}qweight", "I32", rows // 4, entry.shape[1] // 2)
            add(f"{start}wscales", "BF16", entry.shape[1] // 64, rows)
            add(f"{start}wzeros", "BF16", entry.shape[1] // 64, rows)
        else:
            columns = entry.shape[1]
            add(f"{start}qweight", "I8", rows, columns // 2)
            add(f"{start}wscales", "BF16", columns // 64, rows)
            add(f"{start}smooth_factor", "BF16", columns)
            add(f"{start}proj_down", "BF16", columns, rank)
            add(f"{start}proj_up", "BF16", rows, rank)
    return replace(checkpoint, tensors=tensors)


@pytest.mark.slow
def test_the_plan_of_a_full_size_file_is_what_its_run_takes() -> None:
    footprint = require_planned_peaks(in_nunchakus_form(full_size.transformer_checkpoint(layers=3), rank=128), 2.5)
    # 24 * 3072^2 weights of four bits, their scales, and low-rank parts, the shifted layers' twice
    assert 0.53 < footprint.stored_bytes / (24 * DIM * DIM) < 0.7


@pytest.mark.slow
def test_the_plan_of_a_full_size_file_that_is_computed_on_as_stored_is_what_its_run_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from comfy_kitchen.backends.eager import svdquant

    # the functions themselves: torch does not look into comfy-kitchen's operators when tensors are fake
    kitchens = once_a_shape(svdquant.quantize_svdquant_w4a4), once_a_shape(svdquant.scaled_mm_svdquant_w4a4)
    monkeypatch.setattr(svdquant_products, "load_svdquant", lambda: kitchens)
    checkpoint = in_nunchakus_form(full_size.transformer_checkpoint(layers=3), 32)
    linear = LinearChoice(Computing.FAST, {"svdquant": "eager"})
    footprint = require_planned_peaks(checkpoint, 1.5, linear)
    assert footprint.slot_bytes < 0.15e9  # 0.45e9 decoded


# what is refused


def changed(file: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Checkpoint:
    weights = load_file(file)
    change(weights)
    metadata = {"config": json.dumps(dict(open_checkpoint(file).config or {}))}
    save_file(weights, to / "changed.safetensors", metadata=metadata)
    return open_checkpoint(to / "changed.safetensors")


LAYER = "transformer_blocks.1.attn.to_out.0"
DAMAGES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "proj_down is missing": lambda w: w.pop(f"{LAYER}.proj_down"),
    "smooth_factor is missing": lambda w: w.pop(f"{LAYER}.smooth_factor"),
    "wscales is BF16": lambda w: w.update({f"{LAYER}.wscales": w[f"{LAYER}.wscales"][:1]}),
    "proj_up is F32": lambda w: w.update({f"{LAYER}.proj_up": w[f"{LAYER}.proj_up"].float()}),
    "qweight is I8": lambda w: w.update({f"{LAYER}.qweight": w[f"{LAYER}.qweight"].flatten()}),
    "tiles of 128": lambda w: w.update(svdq_of_64_rows()),
    "wscales is missing": lambda w: w.pop("transformer_blocks.0.img_mod.1.wscales"),
}


def svdq_of_64_rows() -> dict[str, torch.Tensor]:
    shapes = {
        "qweight": (64, 64),
        "wscales": (2, 64),
        "smooth_factor": (128,),
        "proj_down": (128, 16),
        "proj_up": (64, 16),
    }
    parts = {part: torch.zeros(shape, dtype=torch.bfloat16) for part, shape in shapes.items()}
    return {
        f"{LAYER}.{part}": value
        for part, value in {
            **parts,
            "qweight": parts["qweight"].to(torch.int8),
            "bias": torch.zeros(64).bfloat16(),
        }.items()
    }


@pytest.mark.parametrize("why", DAMAGES)
def test_parts_that_do_not_belong_together_are_named(
    why: str, written: Callable[[str, int], tuple[Any, Path]], tmp_path: Path
) -> None:
    checkpoint = changed(written("int4", 32)[1], tmp_path, DAMAGES[why])
    with pytest.raises(DamagedFile, match=rf"is not a complete layer of nunchaku's .*{why}.* Download it again\."):
        sort_transformer(checkpoint)


def test_another_rank_and_awq_elsewhere_are_refused(
    written: Callable[[str, int], tuple[Any, Path]], tmp_path: Path
) -> None:
    def other_rank(weights: dict[str, torch.Tensor]) -> None:
        for part in ("proj_down", "proj_up"):
            weights[f"{LAYER}.{part}"] = weights[f"{LAYER}.{part}"][:, :24].contiguous()

    def awq_elsewhere(weights: dict[str, torch.Tensor]) -> None:
        for part in ("qweight", "wscales", "wzeros", "bias"):
            weights[f"{LAYER}.{part}"] = weights[f"transformer_blocks.0.img_mod.1.{part}"].clone()

    file = written("int4", 32)[1]
    with pytest.raises(WrongModel, match="low-rank part of rank 24, which is not supported"):
        sort_transformer(changed(file, tmp_path, other_rank))
    with pytest.raises(WrongModel, match=r"read only in nunchaku's modulation layers \(img_mod.1, txt_mod.1\)"):
        sort_transformer(changed(file, tmp_path, awq_elsewhere))


def test_fp4_without_its_scales_of_rows_is_read_with_ones(
    written: Callable[[str, int], tuple[Any, Path]], tmp_path: Path
) -> None:
    layer = replace(random_layer(384, 128, 32, "fp4"), by_row=torch.ones(384).bfloat16(), whole=1.0)
    parts = {part: value for part, value in layer.packed().items() if part not in ("wcscales", "wtscale")}
    shapes = {f"{name}.weight": (128, 128) for name in PARTS_OF["attn.to_qkv"]}
    weights = decoded(saved(tmp_path, "attn.to_qkv", parts), shapes, torch.float32)
    assert relative(torch.cat(list(weights.values())), layer.weight()) < 1e-6


def test_every_codec_of_nunchakus_is_found_by_its_dtype(tmp_path: Path) -> None:
    tensors = with_nunchaku_layers(
        saved(tmp_path, "attn.to_out.0", random_layer(128, 128, 48, "int4").packed()).tensors
    )
    param = stored_param("attn.to_out.0.weight", tensors, "layer")
    assert param.codec == "svdq_int4_r48"
    assert CODECS[param.codec] is SVDQ["SVDQ_INT4_R48"]
