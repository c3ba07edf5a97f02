"""LoRAs of layers that a file holds joined, or apart: the same bits as on a file that names them as the LoRA does."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from branches_21 import BRANCHES
from format_blocks import STORES, block_in, filled
from lora_files import Parts, change_of, make_parts, write_lora
from qwenimage_lowvram.engine.caches.requantized_weights import RequantizedWeights
from qwenimage_lowvram.engine.errors import Unsupported, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.lora_file import LoraMatch, match, match_model, open_lora
from qwenimage_lowvram.engine.lora.weight_patches import LoraPatch, lora_patches
from qwenimage_lowvram.engine.models.layer_rows import OtherNames, Rows, other_names
from qwenimage_lowvram.engine.models.qwen_image_21.tensors import JOINED_LAYER, SPLIT_LAYERS
from qwenimage_lowvram.engine.models.qwen_image_21.transformer import QwenImage21Transformer
from qwenimage_lowvram.engine.streaming import StoredBlock
from safetensors.torch import load_file, save_file
from small_transformer_21 import random_weights, write_file, write_folder
from torch import Tensor

WIDE, DIM, RANK = 384, 256, 4
BEFORE = "transformer_blocks.0."
WHOLE = f"{BEFORE}{JOINED_LAYER}"
HALVES = tuple(f"{BEFORE}{name}" for name in SPLIT_LAYERS)
JOINS = {JOINED_LAYER: SPLIT_LAYERS}
SHAPES = {
    "joined": {f"{WHOLE}.weight": (2 * WIDE, DIM)},
    "apart": {f"{half}.weight": (WIDE, DIM) for half in HALVES},
}
KINDS = ("lora", "loha", "lokr", "lokr, both products", "diff")


def matched(file: Path, layout: str, shapes: Mapping[str, Mapping[str, tuple[int, ...]]] = SHAPES) -> LoraMatch:
    return match(open_lora(file), shapes[layout], other_names(shapes[layout], JOINS))


def with_alpha(parts: Parts) -> Parts:
    return parts if "diff" in parts else parts | {"alpha": torch.tensor(3.0)}


def write(file: Path, layers: Mapping[str, Parts]) -> Path:
    return write_lora(file, {layer: with_alpha(parts) for layer, parts in layers.items()}, "OneTrainer")


def halves(kind: str, dora: str | None = None, seed: int = 0) -> dict[str, Parts]:
    return {half: make_parts(kind, (WIDE, DIM), seed=seed + i, dora=dora) for i, half in enumerate(HALVES)}


def whole(kind: str, dora: str | None = None, seed: int = 0) -> dict[str, Parts]:
    return {WHOLE: make_parts(kind, (2 * WIDE, DIM), seed=seed, dora=dora)}


def numbers(patch: LoraPatch) -> list[Tensor]:
    """A patch's parts, read."""
    made = []
    for part in patch.parts:
        with part.file.open("rb") as stream:
            stream.seek(part.offset)
            made.append(torch.frombuffer(bytearray(stream.read(part.nbytes)), dtype=torch.float32).view(part.shape))
    return made


def changed(weights: Mapping[str, Tensor], *stack: tuple[LoraMatch, float]) -> Tensor:
    """What a stack makes of the weights of SHAPES, one below the other; its scratch is as small as it may be."""
    result = {name: weight.clone() for name, weight in weights.items()}
    for name, patch in lora_patches(stack).items():
        scratch = torch.full((patch.scratch_bytes // 4,), float("nan")).view(torch.uint8)
        patch.apply(result[name], numbers(patch), scratch)
    return torch.cat([result[name] for name in weights])


@pytest.fixture(scope="module")
def base() -> Tensor:
    return torch.randn(2 * WIDE, DIM, generator=torch.Generator().manual_seed(5)) / DIM**0.5


def both_ways(base: Tensor, files: Sequence[tuple[Path, float]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """On a file that holds the layers joined, and on one that holds them apart."""
    together = {f"{WHOLE}.weight": base.to(dtype)}
    apart = dict(zip(SHAPES["apart"], base.to(dtype).chunk(2), strict=True))
    return (
        changed(together, *((matched(file, "joined"), strength) for file, strength in files)),
        changed(apart, *((matched(file, "apart"), strength) for file, strength in files)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dora", [None, "rows"])
@pytest.mark.parametrize("keys", [halves, whole])
@pytest.mark.parametrize("kind", KINDS)
def test_a_joined_layer_and_its_parts_become_the_same_bits(
    kind: str, keys: object, dora: str | None, dtype: torch.dtype, base: Tensor, tmp_path: Path
) -> None:
    layers = halves(kind, dora) if keys is halves else whole(kind, dora)
    file = write(tmp_path / "l.safetensors", layers)
    joined, apart = both_ways(base, [(file, 0.7)], dtype)
    assert torch.equal(joined, apart)
    if dora is None and dtype is torch.float32:
        change = torch.cat([change_of(with_alpha(parts)) for parts in layers.values()])
        assert (joined.double() - base.double() - 0.7 * change).abs().max() < 1e-5
    for layout in SHAPES:
        assert bool(matched(file, layout).unmatched) == (kind == "diff" and dora is not None)  # which has no norm


def test_a_dora_of_columns_of_each_half_is_of_that_half(base: Tensor, tmp_path: Path) -> None:
    file = write(tmp_path / "l.safetensors", halves("lora", "columns"))
    joined, apart = both_ways(base, [(file, 0.7)], torch.float32)
    assert torch.equal(joined, apart)
    assert not torch.equal(joined, base)


def test_a_dora_of_the_whole_layers_columns_needs_the_whole(base: Tensor, tmp_path: Path) -> None:
    parts = whole("lora", "columns")
    file = write(tmp_path / "l.safetensors", parts)
    found = changed({f"{WHOLE}.weight": base}, (matched(file, "joined"), 1.0))
    full = base.double() + change_of(with_alpha(parts[WHOLE]))
    expected = full * parts[WHOLE]["dora_scale"] / full.norm(dim=0, keepdim=True)
    assert (found.double() - expected).abs().max() < 1e-5
    with pytest.raises(Unsupported) as refused:
        matched(file, "apart")
    assert refused.value.code == "lora.whole_of_apart"
    assert "gate_layer" in str(refused.value)


def test_stacks_of_halves_and_wholes_are_rounded_once(base: Tensor, tmp_path: Path) -> None:
    one_half = write(tmp_path / "half.safetensors", dict([list(halves("lora", seed=9).items())[1]]))
    all_rows = write(tmp_path / "whole.safetensors", whole("loha", seed=7))
    columns = write(tmp_path / "columns.safetensors", whole("lora", "columns", seed=3))
    stack = [(one_half, 0.5), (all_rows, -0.4), (one_half, 1.0)]
    joined, apart = both_ways(base, stack, torch.bfloat16)
    assert torch.equal(joined, apart)
    # a change that takes the whole joined layer, between changes of a half
    mixed = [
        (matched(file, "joined"), strength) for file, strength in [(one_half, 0.5), (columns, 0.3), (one_half, 1.0)]
    ]
    step = {f"{WHOLE}.weight": base}
    for one in mixed:
        step = {f"{WHOLE}.weight": changed(step, one)}
    assert (changed({f"{WHOLE}.weight": base}, *mixed) - step[f"{WHOLE}.weight"]).abs().max() < 1e-6
    rounded = changed({f"{WHOLE}.weight": base.bfloat16()}, *mixed)
    exact = changed({f"{WHOLE}.weight": base.bfloat16().float()}, *mixed)
    assert torch.equal(rounded, exact.bfloat16())


def test_a_file_that_changes_a_half_alone_and_in_the_whole_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "l.safetensors", whole("lora") | halves("lora"))
    for layout in SHAPES:
        with pytest.raises(Unsupported, match="in two ways at once"):
            matched(file, layout)


def test_a_halfs_wrong_shape_is_refused_by_the_models_name(tmp_path: Path) -> None:
    file = write(tmp_path / "l.safetensors", {HALVES[0]: make_parts("lora", (WIDE + 8, DIM))})
    shapes = SHAPES["joined"]
    with pytest.raises(WrongModel, match=r"Choose a LoRA for Qwen-Image-2\.1|choose a LoRA for Qwen-Image-2\.1"):
        match(open_lora(file), shapes, other_names(shapes, JOINS), model="Qwen-Image-2.1")


def test_names_stand_for_rows_both_ways() -> None:
    joined: OtherNames = other_names(SHAPES["joined"], JOINS)
    assert joined == {
        f"{HALVES[0]}.weight": (Rows(f"{WHOLE}.weight", 0, WIDE),),
        f"{HALVES[1]}.weight": (Rows(f"{WHOLE}.weight", WIDE, 2 * WIDE),),
    }
    apart = other_names(SHAPES["apart"], JOINS)
    assert apart == {f"{WHOLE}.weight": tuple(Rows(f"{half}.weight", 0, WIDE) for half in HALVES)}


@pytest.mark.parametrize("format_", STORES)
def test_on_every_format_halves_become_what_they_do_apart(format_: str, tmp_path: Path) -> None:
    wide, dim = 512, 512  # of all formats' blocks and groups
    name = f"{JOINED_LAYER}.weight"
    shapes = {"joined": {f"{WHOLE}.weight": (2 * wide, dim)}, "apart": {f"{h}.weight": (wide, dim) for h in HALVES}}
    layers = {half: make_parts("lora", (wide, dim), rank=RANK, seed=i) for i, half in enumerate(HALVES)}
    file = write(tmp_path / "l.safetensors", layers)
    (patch,) = lora_patches([(matched(file, "joined", shapes), 0.8)]).values()
    plain = block_in(format_, {name: (2 * wide, dim)})
    block = replace(plain, patches=(patch.named(name),))
    expected = _decoded(plain, filled(plain))[name].clone()
    raw = torch.zeros(block.raw.nbytes, dtype=torch.uint8)
    raw[: plain.raw.nbytes] = filled(plain)
    for item, part in zip(block.raw.items[len(plain.raw.items) :], numbers(patch), strict=True):
        item.view(raw).copy_(part)
    found = _decoded(block, raw)[name]
    assert not torch.equal(found, expected)
    apart = dict(zip(shapes["apart"], expected.chunk(2), strict=True))
    wanted = changed(apart, (matched(file, "apart", shapes), 0.8))
    # random bytes of GGUF blocks hold numbers that are none, too
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))
    assert found.isfinite().float().mean() > 0.5


def _decoded(block: StoredBlock, raw: Tensor) -> dict[str, Tensor]:
    slot = torch.zeros(block.slot.nbytes, dtype=torch.uint8)
    if block.native:
        slot.copy_(raw[: block.slot.nbytes])
    scratch = torch.empty(block.scratch_bytes(on_host=True), dtype=torch.uint8)
    for group in block.groups:
        group.decode(raw, slot, scratch)
    return block.slot.views(slot)


def opened(
    path: Path, cpu: Hardware, weight_format: str | None = None, cache: Path | None = None
) -> QwenImage21Transformer:
    checkpoint = open_checkpoint(path)
    if weight_format is not None and cache is not None:
        weights = RequantizedWeights.of(checkpoint, weight_format, cache)
        assert weights is not None
        checkpoint = weights.make(torch.device("cpu"))
    return QwenImage21Transformer(checkpoint, dtype=torch.float32, hardware=cpu)


def answers(transformer: QwenImage21Transformer, resident: Sequence[int] = ()) -> list[Tensor]:
    transformer.load(resident)
    with transformer.session(slots=2) as session:
        return session.forward(BRANCHES["one reference"](torch.float32))


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def lora_of_halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both halves of two blocks, of attention and of what stands outside."""
    weights = random_weights()
    names = [f"transformer_blocks.{i}.{half}" for i in (0, 3) for half in SPLIT_LAYERS]
    names += ["transformer_blocks.1.attn.to_q", "img_in"]
    layers = {name: make_parts("lora", weights[f"{name}.weight"].shape, seed=i) for i, name in enumerate(names)}
    return write(tmp_path_factory.mktemp("loras") / "halves.safetensors", layers)


def test_comfyuis_file_and_diffusers_folder_make_the_same_of_a_lora(
    cpu: Hardware, lora_of_halves: Path, tmp_path: Path
) -> None:
    weights = random_weights()
    folder = opened(write_folder(tmp_path / "folder", weights), cpu)
    file = opened(write_file(tmp_path / "file.safetensors", weights), cpu)
    plain = answers(file)
    keys = load_file(lora_of_halves)
    save_file(_as_wholes(keys), tmp_path / "wholes.safetensors")
    made = []
    for lora in (lora_of_halves, tmp_path / "wholes.safetensors"):
        for transformer in (folder, file):
            found = match_model(open_lora(lora), transformer)
            assert (found.unmatched, found.lora.path) == ((), lora)
            transformer.patch(lora_patches([(found, 0.6)]))
            made.append(answers(transformer))
            assert same(answers(transformer, (0, 2)), made[-1])
    assert same(made[0], made[1])
    assert same(made[2], made[3])
    assert not same(made[0], plain)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(made[0], made[2], strict=True))  # ranks are twice as large
    for transformer in (folder, file):
        transformer.patch({})
        assert same(answers(transformer), plain)


def _as_wholes(keys: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRAs of both halves as one of the joined layer, of their ranks together."""
    made = {}
    for key, value in keys.items():
        gate, proj = SPLIT_LAYERS
        if gate in key:
            other = keys[key.replace(gate, proj)]
            name = key.replace(gate, JOINED_LAYER)
            if "up" in key:
                made[name] = torch.block_diag(value, other)
            elif "down" in key:
                made[name] = torch.cat([value, other])
            else:
                made[name] = value * 2  # of twice the rank
        elif proj not in key:
            made[key] = value.clone()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", ["fp8_e4m3fn_scaled", "int8", "nf4", "fp4"])
def test_requantized_weights_take_halves_and_know_no_lora(
    weight_format: str, cpu: Hardware, lora_of_halves: Path, tmp_path: Path
) -> None:
    file = write_file(tmp_path / "file.safetensors", random_weights())
    transformer = opened(file, cpu, weight_format, tmp_path / "cache")
    cached = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    plain = answers(transformer)
    decoded = {
        f"{prefix}{name}": weight.clone()
        for i, block in enumerate(transformer.store.blocks)
        for prefix in [f"transformer_blocks.{i}."]
        for name, weight in _decoded(block, _raw(block)).items()
    }
    outside = {name: weight for name, weight in random_weights().items() if "transformer_blocks" not in name}
    expected = opened(write_file(tmp_path / "decoded.safetensors", _apart(decoded) | outside), cpu)
    assert same(answers(expected), plain)
    for one in (transformer, expected):
        one.patch(lora_patches([(match_model(open_lora(lora_of_halves), one), 0.6)]))
    assert same(answers(transformer), answers(expected))
    again = opened(file, cpu, weight_format, tmp_path / "cache")
    assert same(answers(again), plain)
    assert {path: path.read_bytes() for path in cached} == cached


def _raw(block: StoredBlock) -> Tensor:
    raw = torch.zeros(block.raw.nbytes, dtype=torch.uint8)
    for item, part in zip(block.raw.items, block.parts, strict=True):
        if part.data is not None:
            stored = bytearray(part.data)
        else:
            with part.file.open("rb") as stream:
                stream.seek(part.offset)
                stored = bytearray(stream.read(part.nbytes))
        raw[item.offset : item.end] = torch.frombuffer(stored, dtype=torch.uint8)
    return raw


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name, weight in weights.items():
        if JOINED_LAYER in name:
            for half, rows in zip(SPLIT_LAYERS, weight.chunk(2), strict=True):
                made[name.replace(JOINED_LAYER, half)] = rows.clone()
        else:
            made[name] = weight
    return made
