"""The linear layers of one block of the real size: on decoded weights, on stored ones, and ComfyUI's own on the same.

    python dev.py bench compute

`seconds` is the median of several visits of the layer, taken in turns, decoding included where weights are decoded, as
they are at every visit of a stream. `scratch_bytes` is what it takes on the device beside x, its result and what lies
there. `error` is relative, against fp32 products with the weights that were quantized. With a LoRA of rank 16: within
the decoded weight (exact), or as a product beside the stored one (fast).
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comfy_files import quantized
from comfyui_layers import comfyuis_linear
from devtools.in_process import use_comfyui
from diffusers_step import DEVICE, DTYPE
from in_turns import seconds_in_turns
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.compute.linear_choice import DECODED, Computing, LinearChoice, choose_linear
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.formats import FORMATS
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.changes import Matrix, Sum
from qwenimage_lowvram.engine.lora.deltas import Delta
from qwenimage_lowvram.engine.lora.weight_patches import LoraPatch
from qwenimage_lowvram.engine.streaming import BlockFiles, BlockStreamer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KINDS = ("int8_row", "int8_convrot")
LAYERS = {"attention": (3072, 3072), "MLP in": (12288, 3072), "MLP out": (3072, 12288)}  # rows, columns
RANK = 16


def rows(quick: bool) -> list[dict[str, Any]]:
    tokens = 16 if quick else 64 if DEVICE.type == "cpu" else 4096
    rounds = 2 if quick else 5
    fast = choose_linear(Computing.FAST, [Hardware.detect(DEVICE)], DTYPE)
    if "int8" not in fast.backends:
        raise SystemExit(fast.why_not)
    use_comfyui()
    results = []
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        for kind in KINDS:
            for name, shape in list(LAYERS.items())[: 1 if quick else None]:
                results += _of_layer(kind, name, shape, tokens, rounds, fast, Path(scratch) / "m.safetensors")
    return results


def _of_layer(
    kind: str, name: str, shape: tuple[int, int], tokens: int, rounds: int, fast: LinearChoice, file: Path
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    x = torch.randn(tokens, shape[1], generator=generator)
    x[:, :: shape[1] // 8] *= 20  # columns that are far larger than others, as the model's have
    lora = [torch.randn(shape[0], RANK, generator=generator) * 0.02, torch.randn(RANK, shape[1], generator=generator)]
    lora[1] /= shape[1] ** 0.5
    parts = {f"layer.{key}": value.contiguous() for key, value in quantized(weight, kind).items()}
    save_file(parts | {"layer.bias": torch.zeros(shape[0], dtype=DTYPE)}, file)
    save_file({"up": lora[0].to(DTYPE), "down": lora[1].to(DTYPE)}, file.with_name("lora.safetensors"))
    plain, changed = x @ weight.T, x @ (weight + lora[0] @ lora[1]).T
    x = x.to(DEVICE, DTYPE)
    with ExitStack() as stack:
        contenders: list[tuple[str, Callable[[], Tensor], Tensor]] = []
        for who, choice in (("exact", DECODED), ("fast", fast)):
            for with_lora in (False, True):
                visit = stack.enter_context(_ours(file, shape, choice, with_lora=with_lora))
                contenders.append(
                    (f"{who}{', LoRA' if with_lora else ''}", partial(visit, x), (plain, changed)[with_lora])
                )
        own = comfyuis_linear(load_file(file), "layer", shape, DTYPE).to(DEVICE)
        contenders.append(("ComfyUI", partial(own, x), plain))
        measured = [(who, *_peak(compute), wanted) for who, compute, wanted in contenders]
        seconds = seconds_in_turns([compute for _, compute, _ in contenders], rounds, DEVICE)
    return [
        {
            "who": who,
            "case": f"{kind}, {name} {shape[1]} to {shape[0]}, {tokens} tokens, {fast.backends['int8']}",
            "seconds": taken,
            "scratch_bytes": peak - result.nbytes,
            "error": float((result.float().cpu() - wanted).norm() / wanted.norm()),
        }
        for (who, result, peak, wanted), taken in zip(measured, seconds, strict=True)
    ]


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
