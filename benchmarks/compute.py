"""Layers of one block of the real size: linear ones on decoded weights, on stored ones, and ComfyUI's own on the same
files; and attention by each kernel.

    python dev.py bench compute

`seconds` is the median of several visits of the layer, taken in turns, decoding included where weights are decoded, as
they are at every visit of a stream. `scratch_bytes` is what it takes on the device beside x, its result and what lies
there. `error` is relative, against fp32 products with the weights that were quantized. With a LoRA of rank 16: within
the decoded weight (exact), or as a product beside the stored one (fast). GGUF is beside ComfyUI-GGUF's way to decode
it where COMFYUI_GGUF_PATH is its source. On a CPU whole blocks follow, ours and ComfyUI's own; on a card
`python dev.py gpu` has them. Then attention of the model's heads, by each kernel that can be chosen; `why`
says what cannot be measured here.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from comfy_files import quantized
from comfyui_layers import comfyuis_formats, comfyuis_linear
from devtools.bench import load
from devtools.comfyui import require_comfyui
from devtools.in_process import use_comfyui
from diffusers_step import DEVICE, DTYPE
from gguf_files import add_tensor, write_writer
from in_turns import seconds_in_turns
from kitchen_w4a8 import has_w4a8
from live_bytes import LiveBytes
from on_gpu import blocks, native
from on_gpu.cases import COMFYUI, GIB, OURS, STORED, STORED_LORA, Case, Sizes
from qwenimage_lowvram.engine.compute.attention import Attention, attention_by
from qwenimage_lowvram.engine.compute.attention_choice import AUTO, CHOICES, choose_attention
from qwenimage_lowvram.engine.compute.linear_choice import DECODED, Computing, LinearChoice, choose_linear
from qwenimage_lowvram.engine.environment import variable
from qwenimage_lowvram.engine.errors import Unsupported
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.formats import FORMATS
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.changes import Matrix, Sum
from qwenimage_lowvram.engine.lora.deltas import Delta
from qwenimage_lowvram.engine.lora.weight_patches import LoraPatch
from qwenimage_lowvram.engine.streaming import BlockFiles, BlockStreamer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

# ComfyUI's formats, and the products that compute on them as stored; and GGUF's, which are decoded
KINDS = {
    "int8_convrot": "int8",
    "int8_row": "int8",
    "int8": "int8",
    "fp8mixed": "fp8",
    "convrot_w4a4": "w4a4",
    "asym_w4a8_int8": "w4a8",
    "nvfp4": "nvfp4",
    "mxfp8": "mxfp8",
}
GGUF_KINDS = ("Q8_0", "Q4_0")
LAYERS = {"attention": (3072, 3072), "MLP in": (12288, 3072), "MLP out": (3072, 12288)}  # rows, columns
HEADS, HEAD_DIM, COMPARED_QUERIES = 24, 128, 64
RANK = 16
# whole blocks of the real size on a CPU, in what ComfyUI computes there; `python dev.py gpu` has steps of all on a card
BLOCKS = Sizes(24, 3584, 2, 2, (128, 128), (16, 9), {8: 8 * GIB}, dtype="float32")
BLOCK_CASES = (
    (OURS, "bf16", ""),
    (COMFYUI, "bf16", ""),
    (OURS, "int8_convrot", ""),
    (OURS, "int8_convrot", STORED),
    (OURS, "int8_convrot", STORED_LORA),
    (COMFYUI, "int8_convrot", ""),
)
BLOCK_SECONDS = 120.0  # of each, at the most

Contender = tuple[str, Callable[[], Tensor], Tensor]


@dataclass(frozen=True)
class Job:
    """layer: of LAYERS. file: that holds it, in the place of the last one."""

    layer: str
    tokens: int
    rounds: int
    fast: LinearChoice
    file: Path

    @property
    def shape(self) -> tuple[int, int]:
        return LAYERS[self.layer]


def rows(quick: bool) -> list[dict[str, Any]]:
    tokens = 16 if quick else 64 if DEVICE.type == "cpu" else 4096
    fast = choose_linear(Computing.FAST, [Hardware.detect(DEVICE)], DTYPE)
    use_comfyui()
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        jobs = [
            Job(layer, tokens, 2 if quick else 5, fast, Path(scratch) / "m.safetensors")
            for layer in list(LAYERS)[: 1 if quick else None]
        ]
        results = [row for kind in KINDS for job in jobs for row in _of_format(kind, job)]
        results += [row for kind in GGUF_KINDS for job in jobs for row in _of_gguf(kind, job)]
        if DEVICE.type == "cpu" and not quick:
            results += of_blocks(Path(scratch), BLOCKS)
    return results + list(_of_attention(256 if quick else 1024 if DEVICE.type == "cpu" else 4608, 2 if quick else 5))


def of_blocks(scratch: Path, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Steps of whole blocks, on a CPU: ours by each way, and ComfyUI's own model, of the same files. `error` is beside
    decoded weights; why a row has no numbers stands in it."""
    folder = scratch / "blocks"
    folder.mkdir()
    for way, stored, how in BLOCK_CASES:
        case = Case(way, stored, sizes.sides[0], False, next(iter(sizes.cards)), how)
        job = {"folder": str(folder), "device": "cpu", "sizes": sizes.to_json(), "case": asdict(case)}
        measure = native.do if way == COMFYUI else blocks.do
        (row,) = measure(job | {"seconds": BLOCK_SECONDS, "comfyui": str(require_comfyui())})
        numbers: dict[str, Any] = {key: row[key] for key in ("seconds", "why") if key in row}
        yield {"who": way, "case": f"{sizes.blocks} blocks, {case}", **numbers, "error": row.get("difference")}


def _of_format(kind: str, job: Job) -> list[dict[str, Any]]:
    product = KINDS[kind]
    case = f"{kind}, {_case(job)}"
    if kind == "asym_w4a8_int8" and not has_w4a8():
        return [{"who": "fast", "case": case, "why": "this comfy-kitchen is older than the format (0.2.27)"}]
    weight, x, lora = _numbers(job)
    parts = {f"layer.{key}": value.contiguous() for key, value in quantized(weight, kind).items()}
    save_file(parts | {"layer.bias": torch.zeros(job.shape[0], dtype=DTYPE)}, job.file)
    own = product in job.fast.backends
    with ExitStack() as stack:
        choices = {"exact": DECODED, **({"fast": job.fast} if own else {})}
        contenders = list(_our_contenders(stack, job, choices, weight, x, lora))
        if own and json.loads(bytes(parts["layer.comfy_quant"].tolist()))["format"] in comfyuis_formats():
            layer = comfyuis_linear(load_file(job.file), "layer", job.shape, DTYPE).to(DEVICE)
            contenders.append(("ComfyUI", partial(layer, x.to(DEVICE, DTYPE)), x @ weight.T))
        made = _measured(contenders, f"{case}, {job.fast.backends.get(product, 'decoded')}", job.rounds)
    return made if own else [*made, {"who": "fast", "case": case, "why": f"no {product} products here"}]


def _of_gguf(kind: str, job: Job) -> list[dict[str, Any]]:
    """Beside how ComfyUI-GGUF decodes it, where COMFYUI_GGUF_PATH is its source."""
    weight, x, lora = _numbers(job)
    file = job.file.with_suffix(".gguf")
    writer = gguf.GGUFWriter(file, "qwen_image")
    add_tensor(writer, "layer.weight", weight, kind)
    add_tensor(writer, "layer.bias", torch.zeros(job.shape[0]), "F32")
    write_writer(writer)
    with ExitStack() as stack:
        contenders = list(_our_contenders(stack, replace(job, file=file), {"exact": DECODED}, weight, x, lora))
        if (dequantize := _comfyui_ggufs()) is not None:
            type_ = gguf.GGMLQuantizationType[kind]
            raw = torch.from_numpy(gguf.quants.quantize(weight.numpy(), type_)).to(DEVICE)
            on_device, bias = x.to(DEVICE, DTYPE), torch.zeros(job.shape[0], dtype=DTYPE, device=DEVICE)

            def compute() -> Tensor:
                return F.linear(on_device, dequantize(raw, type_, job.shape, DTYPE).to(DTYPE), bias)

            contenders.append(("ComfyUI-GGUF", compute, x @ weight.T))
        return _measured(contenders, f"GGUF {kind}, {_case(job)}", job.rounds)


def _of_attention(tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Each kernel that a person can choose, or why it does not work here."""
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(1, HEADS, tokens, HEAD_DIM, generator=generator) for _ in range(3)]
    wide[1][..., :: HEAD_DIM // 4] += 6  # keys lie aside from zero, as the model's do
    wanted = F.scaled_dot_product_attention(wide[0][:, :, :COMPARED_QUERIES], *wide[1:])
    given = [part.to(DEVICE, DTYPE) for part in wide]
    case, contenders = f"attention, {HEADS} heads of {HEAD_DIM}, {tokens} tokens", list[Contender]()
    for name in (name for name in CHOICES if name != AUTO):
        try:
            attention = choose_attention(name, [Hardware.detect(DEVICE)], DTYPE, tried={})
        except Unsupported as error:
            yield {"who": name, "case": case, "why": str(error).partition(": ")[2].partition("\n")[0]}
            continue

        def compute(attention: Attention = attention) -> Tensor:
            with attention_by(attention):
                return F.scaled_dot_product_attention(*given)

        contenders.append((name, compute, wanted))
    yield from _measured(contenders, case, rounds)


def _case(job: Job) -> str:
    return f"{job.layer} {job.shape[1]} to {job.shape[0]}, {job.tokens} tokens"


def _numbers(job: Job) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Weight and x in fp32, and a LoRA, whose halves are written beside the file."""
    rows, columns = job.shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    x = torch.randn(job.tokens, columns, generator=generator)
    x[:, :: columns // 8] *= 20  # columns that are far larger than others, as the model's have
    up = torch.randn(rows, RANK, generator=generator) * 0.02
    down = torch.randn(RANK, columns, generator=generator) / columns**0.5
    save_file({"up": up.to(DTYPE), "down": down.to(DTYPE)}, job.file.with_name("lora.safetensors"))
    return weight, x, (up, down)


def _our_contenders(
    stack: ExitStack,
    job: Job,
    choices: Mapping[str, LinearChoice],
    weight: Tensor,
    x: Tensor,
    lora: Sequence[Tensor],
) -> Iterator[Contender]:
    plain, changed = x @ weight.T, x @ (weight + lora[0] @ lora[1]).T
    for who, choice in choices.items():
        for with_lora in (False, True):
            visit = stack.enter_context(_ours(job.file, job.shape, choice, with_lora=with_lora))
            wanted = changed if with_lora else plain
            yield f"{who}{', LoRA' if with_lora else ''}", partial(visit, x.to(DEVICE, DTYPE)), wanted


def _measured(contenders: Sequence[Contender], case: str, rounds: int) -> list[dict[str, Any]]:
    """Errors are those of the first rows that are compared, of attention."""
    measured = [(who, *_peak(compute), wanted) for who, compute, wanted in contenders]
    seconds = seconds_in_turns([compute for _, compute, _ in contenders], rounds, DEVICE)
    return [
        {
            "who": who,
            "case": case,
            "seconds": taken,
            "scratch_bytes": peak - result.nbytes,
            "error": _error(result[..., : wanted.shape[-2], :].float().cpu(), wanted),
        }
        for (who, result, peak, wanted), taken in zip(measured, seconds, strict=True)
    ]


def _error(result: Tensor, wanted: Tensor) -> float:
    return float((result - wanted).norm() / wanted.norm())


def _comfyui_ggufs() -> Callable[..., Tensor] | None:
    """Its way to decode; None where its source is not told."""
    folder = variable("COMFYUI_GGUF_PATH")
    return load(Path(folder) / "dequant.py").dequantize if folder else None


@contextmanager
def _ours(
    file: Path, shape: tuple[int, int], choice: LinearChoice, *, with_lora: bool
) -> Iterator[Callable[[Tensor], Tensor]]:
    """A visit of the layer that lies in host memory as it is stored: brought, decoded where it is, computed."""
    tensors = FORMATS.described_tensors(open_checkpoint(file))
    make = partial(_make_layer, shape)
    files = BlockFiles([tensors], make, DTYPE, file.name, product_of=choice.product_of)
    store = files.open(Hardware.detect(DEVICE))
    if with_lora:
        entries = open_checkpoint(file.with_name("lora.safetensors")).tensors
        delta = Delta("layer.weight", shape, Sum(Matrix((entries["up"], entries["down"]))))
        files.patch([store], {(0, "layer.weight"): LoraPatch("layer.weight", ((delta, 1.0),))})
    if store.blocks[0].native and not store.blocks[0].patches:
        store.set_resident([0])
    else:
        store.set_held([0])
    with BlockStreamer(store, slots=1) as streamer:

        def visit(x: Tensor) -> Tensor:
            (result,) = [block.layer(x) for _, block in streamer.visit()]
            return result

        visit(torch.zeros(1, shape[1], device=DEVICE, dtype=DTYPE))
        yield visit


def _make_layer(shape: tuple[int, int]) -> nn.Module:
    module = nn.Module()
    with torch.device("meta"):
        module.layer = nn.Linear(shape[1], shape[0])
    return module


def _peak(compute: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result, and what was alive at the most beside what was there before."""
    with LiveBytes(DEVICE.type) as live:
        result = compute()
    return result, live.peak
