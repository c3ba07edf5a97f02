"""A format is a class and a line: told, described, laid out, streamed and decoded with no word of it elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from qwenimage_lowvram.engine.errors import WrongModel
from qwenimage_lowvram.engine.files.checkpoint import TensorEntry, open_checkpoint
from qwenimage_lowvram.engine.formats import FORMATS, Format, Formats, Layout, Scratch, StoredParam
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.streaming import BlockStore, BlockStreamer, FileSource, store_block
from safetensors.torch import save_file
from torch import Tensor, nn

ROWS, COLUMNS, BLOCKS = 12, 40, 3
TRITS_IN_BYTE = 5  # 3 ** 5 = 243


@dataclass(frozen=True)
class TritCodec:
    """Two parts: (N, K / 5) bytes, each the number that five digits of -1, 0 and 1 make to base 3, and N scales."""

    name: str = "trits"

    def encode(self, weight: Tensor) -> tuple[Tensor, ...]:
        scale = weight.abs().amax(dim=1, keepdim=True)
        digits = (weight / scale).round().long().view(len(weight), -1, TRITS_IN_BYTE) + 1
        return (digits * 3 ** torch.arange(TRITS_IN_BYTE)).sum(dim=2).to(torch.uint8), scale

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        data, scale = parts
        digits = data.long().unsqueeze(2) // 3 ** torch.arange(TRITS_IN_BYTE) % 3 - 1
        out.copy_(digits.view(out.shape) * scale)

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        return 24 * shape[0] * shape[1]


TRIT = TritCodec()


class Trits(Format):
    """Told by the scale beside it."""

    dtypes = ("TRITS",)
    codecs = (TRIT,)
    encoders = (TRIT,)

    def describe(
        self, tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str], path: Path
    ) -> Mapping[str, TensorEntry]:
        noted = [name.removesuffix(".trit_scale") for name in tensors if name.endswith(".trit_scale")]
        weights = {f"{layer}.weight": tensors[f"{layer}.weight"] for layer in noted}
        return dict(tensors) | {
            name: replace(entry, dtype="TRITS", shape=(entry.shape[0], entry.shape[1] * TRITS_IN_BYTE))
            for name, entry in weights.items()
        }

    def recognise(self, name: str, tensors: Mapping[str, TensorEntry]) -> StoredParam | None:
        scale = tensors[f"{name.removesuffix('weight')}trit_scale"]
        return StoredParam(name, tensors[name].shape, TRIT, (tensors[name], scale))

    def raw_layout(self, part: TensorEntry) -> Layout:
        return torch.uint8, (part.shape[0], part.shape[1] // TRITS_IN_BYTE)


WITH_TRITS = Formats((*FORMATS.formats, Trits()))


def linear() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(COLUMNS, ROWS))


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, list[dict[str, Tensor]]]:
    """Blocks with a weight in trits and a bias in fp16, and what they are."""
    stored, weights = {}, []
    for i in range(BLOCKS):
        generator = torch.Generator().manual_seed(i)
        weight = torch.randint(-1, 2, (ROWS, COLUMNS), generator=generator) * torch.logspace(-1, 1, ROWS)[:, None]
        bias = torch.randn(ROWS, generator=generator).half()
        data, scale = TRIT.encode(weight)
        stored |= {f"{i}.0.weight": data, f"{i}.0.trit_scale": scale, f"{i}.0.bias": bias}
        weights.append({"0.weight": weight, "0.bias": bias.float()})
    save_file(stored, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors", weights


def of_block(tensors: Mapping[str, TensorEntry], index: int) -> dict[str, TensorEntry]:
    return {name.removeprefix(f"{index}."): entry for name, entry in tensors.items() if name.startswith(f"{index}.")}


def test_blocks_in_a_format_of_tomorrow_are_streamed_as_any_other(
    file: tuple[Path, list[dict[str, Tensor]]], cpu: Hardware
) -> None:
    path, weights = file
    tensors = WITH_TRITS.described_tensors(open_checkpoint(path))
    shapes = {name: tuple(parameter.shape) for name, parameter in linear().named_parameters()}
    blocks = [
        store_block(shapes, of_block(tensors, i), torch.float32, f"block {i}", formats=WITH_TRITS)
        for i in range(BLOCKS)
    ]
    assert {param.name: param.codec for param in blocks[0].params} == {"0.weight": "trits", "0.bias": "fp16"}
    assert blocks[0].nbytes == ROWS * COLUMNS // 5 + 4 * ROWS + 2 * ROWS
    store = BlockStore(blocks, FileSource(blocks), linear, cpu)
    store.set_resident([1])
    with BlockStreamer(store, slots=2) as streamer:
        for index, block in streamer.visit(more=False):
            for name, value in block.named_parameters():
                assert torch.equal(value, weights[index][name])


def test_what_is_not_in_the_list_is_not_read(file: tuple[Path, list[dict[str, Tensor]]]) -> None:
    tensors = FORMATS.described_tensors(open_checkpoint(file[0]))
    with pytest.raises(WrongModel, match=r"0\.weight is stored as U8\[12, 8\] in a quantization .*: trit_scale"):
        FORMATS.stored_param("0.weight", of_block(tensors, 0), "m")


def test_codecs_and_encoders_are_those_of_the_list() -> None:
    assert WITH_TRITS.codecs["trits"] is TRIT
    assert WITH_TRITS.encoders["trits"] is TRIT
    assert WITH_TRITS.codecs.keys() - FORMATS.codecs.keys() == {"trits"}
    assert FORMATS.encoders.keys() <= FORMATS.codecs.keys()


def test_no_two_formats_have_a_codec_of_one_name() -> None:
    names = [codec.name for format_ in FORMATS.formats for codec in format_.codecs]
    assert len(names) == len(set(names))


def test_the_first_that_recognises_a_parameter_has_it() -> None:
    class Louder(Format):
        dtypes = ("BF16",)

        def recognise(self, name: str, tensors: Mapping[str, TensorEntry]) -> StoredParam | None:
            return StoredParam(name, tensors[name].shape, TRIT, (tensors[name],)) if name == "mine" else None

    formats = Formats((Louder(), *FORMATS.formats))
    tensors = {name: TensorEntry(Path("m"), 0, 8, "BF16", (4,)) for name in ("mine", "theirs")}
    assert {name: formats.stored_param(name, tensors, "m").codec for name in tensors} == {
        "mine": "trits",
        "theirs": "bf16",
    }


def test_a_part_that_no_format_lays_out_is_refused_by_its_dtype() -> None:
    with pytest.raises(WrongModel, match="holds numbers in F4, which is not supported"):
        FORMATS.raw_layout(TensorEntry(Path("m"), 0, 1, "F4", (2,)))
