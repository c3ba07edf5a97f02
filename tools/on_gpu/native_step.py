"""A step of ComfyUI's own model, through its guider and samplers as a graph has them. After `native` prepared it."""

import gc
import time
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from qwenimage_lowvram.engine.models.qwen_image.latents import pack, unpack
from torch import Tensor

from .block_files import BlockFiles
from .cases import REAL, Case, Sizes, answer_name
from .deadline import Deadline
from .small_card import small_card
from .steps import GUIDANCE, SIGMA, Inputs, Ready, compared, measured

_BLOCKS = "transformer_blocks."


@torch.inference_mode()  # as nodes run; quantized weights are to be opened, moved and let go in it
def measure(case: Case, sizes: Sizes, folder: Path, device_name: str, seconds: float) -> dict[str, Any]:
    device, deadline = torch.device(device_name), Deadline(seconds)
    file = BlockFiles(folder, sizes, device).path(case.stored)
    weights = next(file.glob("*.safetensors")) if file.is_dir() else file
    if sizes.heads != REAL.heads:
        from native_sizes import teach_transformer

        teach_transformer()
    comfy.model_management.unload_all_models()
    with small_card(device, None if case.card is None else sizes.cards[case.card]) as watched:
        row, made = _sampled(weights, case, sizes, device, deadline)
        comfy.model_management.unload_all_models()
        gc.collect()
    if watched is not None:
        row["allocated_bytes"] -= watched.ballast_bytes
        row["peak_bytes"] = watched.peak_bytes
    answer = folder / answer_name(case, sizes.blocks)
    if not answer.exists():
        return row | {"why": "not compared: no answer of everything resident is there"}
    if case.side // 16 % 2:
        return row | {"why": "not compared: ComfyUI has other positions for an odd number of patches"}
    return row | compared(made, torch.load(answer))


def _sampled(
    weights: Path, case: Case, sizes: Sizes, device: torch.device, deadline: Deadline
) -> tuple[dict[str, Any], Tensor]:
    """ComfyUI calls a sampler, whose evaluations of the model are the steps that are measured."""
    inputs = Inputs.of(case, sizes, device)
    sigma = torch.full((1,), SIGMA, device=device)
    image = unpack(inputs.tokens.float(), case.side // 8, case.side // 8)
    found: list[tuple[dict[str, Any], Tensor]] = []

    def sample(model: Any, noise: Tensor, sigmas: Tensor, extra_args: Any = None, **options: Any) -> Tensor:
        def step(more: bool) -> list[Tensor]:
            return [pack((image - model(image, sigma, **extra_args)) / SIGMA)]

        found.append(measured(Ready(step, sizes.blocks), sizes, device, deadline))
        return noise

    guider = comfy.samplers.CFGGuider(_opened(weights, sizes))
    conditions = [[[prompt.float().cpu(), {}]] for prompt in inputs.prompts]
    guider.set_conds(conditions[0], conditions[-1])
    guider.set_cfg(GUIDANCE if case.guided else 1.0)
    noise = torch.zeros_like(image, device="cpu")
    start = time.perf_counter()
    guider.sample(noise, noise, comfy.samplers.KSAMPLER(sample), torch.tensor([1.0, 0.0]), disable_pbar=True, seed=0)
    row, made = found[0]
    return row | {"with_loading_seconds": time.perf_counter() - start}, made


def _opened(weights: Path, sizes: Sizes) -> Any:
    """A model of as many blocks as ours, those of its file over and over."""
    stored, metadata = comfy.utils.load_torch_file(str(weights), return_metadata=True)
    count = 1 + max(int(name.split(".")[1]) for name in stored if name.startswith(_BLOCKS))
    for name in [name for name in stored if name.startswith(_BLOCKS)]:
        _, index, rest = name.split(".", 2)
        for i in range(int(index) + count, sizes.blocks, count):
            stored[f"{_BLOCKS}{i}.{rest}"] = stored[name]
    model = comfy.sd.load_diffusion_model_state_dict(stored, metadata=metadata)
    if model is None:
        raise RuntimeError(f"ComfyUI does not know the model of {weights.name}")
    return model
