"""One image through the VAE of the real size, random weights: ours, diffusers' and ComfyUI's, whole and tiled.

    python dev.py bench vae

Everybody decodes the same latents in one process, in turns. `seconds` is the median of the turns, `best_seconds` the
fastest, which other programs on the machine disturb least, and `times_ours` the ratio of that to ours; `cpu_seconds`
is the fastest turn in the processor's own time, of all threads. `peak_bytes` counts what is live beside the
weights: all tensors on a CPU, allocated memory on a GPU. `error` is the largest difference from diffusers' whole
image in fp32 (0..1).
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from devtools.comfyui import require_comfyui
from diffusers import AutoencoderKLQwenImage
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.models.qwen_image_vae.image_vae import ImageVAE
from small_checkpoint import make_vae
from split_files import wan_vae_name
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@dataclass
class _Contestant:
    who: str
    case: str
    decode: Callable[[], Tensor]  # -> (1, H, W, 3) in 0..1
    weights: list[Tensor]
    turns: list[tuple[float, float]] = field(default_factory=list)


def rows(quick: bool) -> list[dict[str, Any]]:
    side, tile, turns = (384, 256, 1) if quick else (512, 256, 3)
    latents = torch.randn(1, 16, 1, side // 8, side // 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        model = make_vae(base_dim=96, seed=0)
        expected = _decode_diffusers(model.to(DEVICE), latents)
        contestants = [
            *_ours(model, latents, side),
            *_diffusers(model if model.dtype == DTYPE else model.to(DTYPE), latents, side, tile),
            *_comfyui(model, latents, side, tile),
        ]
        errors, peaks = [], []
        for contestant in contestants:
            image, peak = _measure_memory(contestant)
            errors.append(float((image.float().cpu() - expected.cpu()).abs().max()))
            peaks.append(peak)
        for _ in range(turns):
            for contestant in contestants:
                contestant.turns.append(_time(contestant.decode))
    ours = min(turn[0] for turn in contestants[0].turns)
    return [
        {
            "who": contestant.who,
            "case": contestant.case,
            "seconds": statistics.median(turn[0] for turn in contestant.turns),
            "peak_bytes": peak,
            "error": error,
            "best_seconds": min(turn[0] for turn in contestant.turns),
            "times_ours": min(turn[0] for turn in contestant.turns) / ours,
            "cpu_seconds": min(turn[1] for turn in contestant.turns),
            "weight_bytes": sum(tensor.nbytes for tensor in contestant.weights),
            "threads": torch.get_num_threads(),
        }
        for contestant, error, peak in zip(contestants, errors, peaks, strict=True)
    ]


def _ours(model: AutoencoderKLQwenImage, latents: Tensor, side: int) -> list[_Contestant]:
    vae = ImageVAE.from_state_dict(model.state_dict(), dtype=DTYPE).to(DEVICE)
    weights = [*vae.parameters()]
    limit = vae.plan_decode(side, side).peak_bytes * 8 // 10
    plan = vae.plan_decode(side, side, limit)
    tiled = f"{side}x{side}, {len(plan.columns)}x{len(plan.rows)} tiles under {limit / 2**20:.0f} MiB"
    return [
        _Contestant("ours", f"{side}x{side}", lambda: vae.decode(latents), weights),
        _Contestant("ours tiled", tiled, lambda: vae.decode(latents, limit_bytes=limit), weights),
    ]


def _diffusers(model: AutoencoderKLQwenImage, latents: Tensor, side: int, tile: int) -> list[_Contestant]:
    def tiled() -> Tensor:
        stride = tile * 3 // 4
        model.enable_tiling(tile, tile, stride, stride)
        try:
            return _decode_diffusers(model, latents)
        finally:
            model.disable_tiling()

    weights = [*model.parameters()]
    return [
        _Contestant("diffusers", f"{side}x{side}", lambda: _decode_diffusers(model, latents), weights),
        _Contestant("diffusers tiling", f"{side}x{side}, tiles of {tile}, stride {tile * 3 // 4}", tiled, weights),
    ]


def _decode_diffusers(model: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    image = model.decode(latents.to(DEVICE, model.dtype)).sample[:, :, 0]
    return (image.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def _comfyui(model: AutoencoderKLQwenImage, latents: Tensor, side: int, tile: int) -> list[_Contestant]:
    sys.path.insert(0, str(require_comfyui()))
    from comfy.cli_args import args

    args.cpu = DEVICE.type == "cpu"
    import comfy.sd

    state = {wan_vae_name(name): tensor.cpu().clone() for name, tensor in model.state_dict().items()}
    vae = comfy.sd.VAE(sd=state, dtype=DTYPE)
    overlap = tile // 4

    def tiled() -> Tensor:
        return vae.decode_tiled(latents, tile_x=tile // 8, tile_y=tile // 8, overlap=overlap // 8)[:, 0]

    weights = [*vae.first_stage_model.parameters()]
    return [
        _Contestant("comfyui", f"{side}x{side}", lambda: vae.decode(latents)[:, 0], weights),
        _Contestant("comfyui tiled", f"{side}x{side}, tiles of {tile}, overlap {overlap}", tiled, weights),
    ]


def _measure_memory(contestant: _Contestant) -> tuple[Tensor, int]:
    """The image, and the live bytes of making it: everything beside the weights."""
    if DEVICE.type == "cuda":
        contestant.decode()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return contestant.decode(), torch.cuda.max_memory_allocated() - before
    with LiveBytes(DEVICE.type) as live:
        for tensor in contestant.weights:
            tensor.view_as(tensor)  # counted from here on, so that views of weights add nothing
        before = live.now
        return contestant.decode(), live.peak - before


def _time(decode: Callable[[], Tensor]) -> tuple[float, float]:
    start = time.perf_counter(), time.process_time()
    decode()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start[0], time.process_time() - start[1]
