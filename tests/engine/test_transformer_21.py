"""Qwen-Image-2.1's transformer: one result wherever its blocks lie and however its file stores them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from branches_21 import BRANCHES, make_branch, make_prefix
from comfy_files import quantized, read_dequantized
from gguf_files import read_gguf, write_gguf_transformer
from qwenimage_lowvram.engine.compute.linear_choice import DECODED, Computing, choose_linear
from qwenimage_lowvram.engine.compute.stored_linear import StoredLinear
from qwenimage_lowvram.engine.errors import InvalidRequest, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image_21.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image_21.layers import Block
from qwenimage_lowvram.engine.models.qwen_image_21.prefix import Prefix
from qwenimage_lowvram.engine.models.qwen_image_21.transformer import QwenImage21Transformer
from safetensors.torch import save_file
from small_transformer_21 import LAYERS, joined, random_weights, write_file, write_folder
from torch import Tensor

RESIDENT = [(), (0,), (1, 3), tuple(range(LAYERS))]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """The small transformer as ComfyUI's file, in each dtype."""
    folder = tmp_path_factory.mktemp("small")
    made = {}
    for dtype in DTYPES:
        weights = {name: weight.to(dtype) for name, weight in random_weights().items()}
        made[dtype] = write_file(folder / f"{dtype}.safetensors", weights)
    return made


def opened(
    path: Path, dtype: torch.dtype, hardware: Hardware, resident: Sequence[int] = (), **options: Any
) -> QwenImage21Transformer:
    transformer = QwenImage21Transformer(open_checkpoint(path), dtype=dtype, hardware=hardware, **options)
    transformer.load(resident)
    return transformer


def run(transformer: QwenImage21Transformer, branches: Sequence[Branch], **options: Any) -> list[Tensor]:
    with transformer.session(**{"slots": 2, **options}) as session:
        return session.forward(branches)


def is_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_way_the_blocks_take_the_result_is_the_same(
    dtype: torch.dtype, files: dict[torch.dtype, Path], hardware: Hardware, cpu: Hardware
) -> None:
    branches = BRANCHES["three references, with guidance"](dtype)
    expected = run(opened(files[dtype], dtype, cpu, RESIDENT[-1]), branches)
    assert all(0.1 < e.float().std() < 10 for e in expected)
    transformer = opened(files[dtype], dtype, hardware)
    for resident in RESIDENT:
        transformer.load(resident)
        for slots in (1, 2, 3):
            assert is_same(run(transformer, branches, slots=slots), expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", BRANCHES)
def test_branches_do_not_touch_each_other(case: str, files: dict[torch.dtype, Path], cpu: Hardware) -> None:
    transformer = opened(files[torch.float32], torch.float32, cpu)
    branches = BRANCHES[case](torch.float32)
    alone = [run(transformer, [branch])[0] for branch in branches]
    assert is_same(run(transformer, branches), alone)


@pytest.mark.parametrize("chunk", [64, 100])
def test_the_mlp_of_a_few_tokens_at_a_time_computes_the_same(
    chunk: int, files: dict[torch.dtype, Path], cpu: Hardware
) -> None:
    transformer = opened(files[torch.bfloat16], torch.bfloat16, cpu)
    branch = make_branch(13, dtype=torch.bfloat16, shape=(16, 20))
    assert is_same(run(transformer, [branch], mlp_chunk_tokens=chunk), run(transformer, [branch]))


def test_one_pass_visits_each_block_once_whatever_the_branches(files: dict[torch.dtype, Path], cpu: Hardware) -> None:
    transformer = opened(files[torch.float32], torch.float32, cpu)
    run(transformer, BRANCHES["a batch"](torch.float32))
    assert transformer.store.fetched_blocks == LAYERS


class Counted:
    """How many tokens go through the blocks, time after time; those that are only asked for keys are not among them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        finish = Block._finish

        def counted(block: Block, hidden: Tensor, *args: Any) -> Tensor:
            self.tokens.append(hidden.shape[1])
            return finish(block, hidden, *args)

        monkeypatch.setattr(Block, "_finish", counted)


def test_prompts_about_the_same_images_run_these_through_the_blocks_once(
    files: dict[torch.dtype, Path], cpu: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    branches = [make_branch(n, references=2, seed=n) for n in (13, 5)]
    run(opened(files[torch.float32], torch.float32, cpu), branches)
    images = 24 + 8 + 5  # with the text before the last of them
    # behind the last block nobody asks for the prefix
    assert counted.tokens == [images, 13, 48, 5, 48] * (LAYERS - 1) + [48, 48]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_folder_and_a_file_of_the_same_weights_compute_the_same(prefix: str, tmp_path: Path, cpu: Hardware) -> None:
    weights = random_weights()
    folder = write_folder(tmp_path / "transformer", weights)
    file = write_file(tmp_path / "comfyui.safetensors", weights, prefix)
    branches = BRANCHES["two references"](torch.float32)
    expected = run(opened(folder, torch.float32, cpu), branches)
    assert is_same(run(opened(file, torch.float32, cpu), branches), expected)


def test_a_note_about_attention_in_the_file_is_passed_over(tmp_path: Path, cpu: Hardware) -> None:
    note = torch.tensor(list(b'{"attention": "comfy_kitchen_int8"}'), dtype=torch.uint8)
    tensors = joined(random_weights()) | {
        "comfy_attention.config": note,
        "transformer_blocks.0.attn.comfy_attention.config": note.clone(),
    }
    save_file(tensors, tmp_path / "noted.safetensors")
    plain = write_file(tmp_path / "plain.safetensors", random_weights())
    branches = BRANCHES["one"](torch.float32)
    expected = run(opened(plain, torch.float32, cpu), branches)
    assert is_same(run(opened(tmp_path / "noted.safetensors", torch.float32, cpu), branches), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int8_row", "int8_convrot", "fp8mixed"])
def test_a_quantized_file_computes_what_its_decoded_weights_do(kind: str, tmp_path: Path, hardware: Hardware) -> None:
    write_quantized(tmp_path / f"{kind}.safetensors", kind)
    # rounded once when they are read, as ours are
    save_file(read_dequantized(tmp_path / f"{kind}.safetensors"), tmp_path / "plain.safetensors")
    branches = BRANCHES["one reference"](torch.bfloat16)
    expected = run(opened(tmp_path / "plain.safetensors", torch.bfloat16, hardware), branches)
    transformer = opened(tmp_path / f"{kind}.safetensors", torch.bfloat16, hardware, RESIDENT[2])
    assert transformer.weight_format.startswith(kind[:3])
    assert is_same(run(transformer, branches), expected)


@pytest.mark.parametrize(("kind", "most"), [("int8_row", 0.1), ("int8_convrot", 0.1), ("convrot_w4a4", 0.5)])
def test_layers_compute_on_stored_weights_wherever_their_blocks_live(
    kind: str, most: float, tmp_path: Path, cpu: Hardware
) -> None:
    file = tmp_path / f"{kind}.safetensors"
    write_quantized(file, kind)
    linear = choose_linear(Computing.FAST, [cpu], torch.bfloat16)
    branches = BRANCHES["one reference"](torch.bfloat16)
    exact, streamed, resident = (
        run(opened(file, torch.bfloat16, cpu, where, linear=choice), branches)
        for choice, where in ((DECODED, ()), (linear, ()), (linear, (1, 3)))
    )
    assert is_same(streamed, resident)
    whole = opened(file, torch.bfloat16, cpu, linear=linear)
    assert isinstance(whole.outside.modulation[1], StoredLinear) == kind.startswith("int8")
    assert 1e-4 < ((streamed[0] - exact[0]).norm() / exact[0].norm()).item() < most


def write_quantized(file: Path, kind: str) -> None:
    tensors = {}
    for name, weight in joined(random_weights()).items():
        layer = name.removesuffix(".weight")
        if weight.ndim > 1 and ("transformer_blocks" in name or kind.startswith("int8")):
            tensors |= {f"{layer}.{part}": value for part, value in quantized(weight.bfloat16(), kind).items()}
        else:
            tensors[name] = weight.bfloat16()
    save_file(tensors, file)


@pytest.mark.parametrize("layout", [joined, dict], ids=["as ComfyUI's", "as diffusers'"])
def test_a_gguf_file_computes_what_its_decoded_weights_do(layout: Any, tmp_path: Path, cpu: Hardware) -> None:
    config = {"axes_dims_rope": [4, 14, 14]}
    write_gguf_transformer(tmp_path / "q.gguf", layout(random_weights()), config, "Q8_0", "Q4_0")
    save_file(read_gguf(tmp_path / "q.gguf"), tmp_path / "plain.safetensors")
    branches = BRANCHES["one reference"](torch.float32)
    expected = run(opened(tmp_path / "plain.safetensors", torch.float32, cpu), branches)
    assert is_same(run(opened(tmp_path / "q.gguf", torch.float32, cpu), branches), expected)


@pytest.mark.parametrize(
    ("lost", "code"),
    [
        ("proj_out.weight", "model.lacks_tensor"),
        ("txt_in.in_layer.weight", "model.lacks_tensor"),
        ("transformer_blocks.3.attn.to_k.weight", "model.block_lacks_tensor"),
        ("time_text_embed.timestep_embedder.linear_1.weight", "model.block_lacks_tensor"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(lost: str, code: str, tmp_path: Path, cpu: Hardware) -> None:
    tensors = joined(random_weights())
    del tensors[lost]
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(WrongModel) as refused:
        opened(tmp_path / "m.safetensors", torch.float32, cpu)
    assert refused.value.code == code


def test_other_channels_are_refused(tmp_path: Path, cpu: Hardware) -> None:
    tensors = joined(random_weights()) | {"proj_out.weight": torch.zeros(16, 128)}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(WrongModel, match="64") as refused:
        opened(tmp_path / "m.safetensors", torch.float32, cpu)
    assert refused.value.code == "transformer_21.other_channels"


def test_a_prompt_beyond_the_positions_is_refused(files: dict[torch.dtype, Path], cpu: Hardware) -> None:
    transformer = opened(files[torch.float32], torch.float32, cpu)
    branch = make_branch(8191)
    with pytest.raises(InvalidRequest) as refused:
        run(transformer, [branch])  # the image reaches beyond
    assert refused.value.code == "prompt_21.too_long"


@pytest.mark.parametrize("slots", [(), (3, 5), (5, 3, 5), (3, 5, 99)], ids=str)
def test_references_without_a_place_in_the_prompt_are_refused(slots: tuple[int, ...]) -> None:
    good = make_prefix(9, references=3)
    with pytest.raises(InvalidRequest) as refused:
        _ = Prefix(good.text, good.references, good.shapes, slots).tokens
    assert refused.value.code == "prompt_21.wrong_slots"


def test_keys_tell_prompts_images_and_padding_apart_and_nothing_else() -> None:
    def keys(**options: Any) -> list[str]:
        return [stretch.key for stretch in make_prefix(9, **{"references": 2, **options}).stretches]

    assert keys() == keys()
    assert keys(seed=1)[0] == keys()[0]
    assert keys(seed=1)[1] != keys()[1]
    assert not {*keys(references=3)} & {*keys()}
    assert not {*keys(dtype=torch.bfloat16)} & {*keys()}
    assert keys(masked=2)[1] != keys()[1]
    moved = make_prefix(9, references=2)
    moved = Prefix(moved.text, moved.references, moved.shapes, (2, 5))
    assert not {stretch.key for stretch in moved.stretches} & {*keys()}
