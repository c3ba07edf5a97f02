"""ComfyUI's own sampler drives our MODEL on a simulated card: the CPU's bits, no race, and no young wait of ours."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.models.qwen_image.positions import Positions
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.forecast import TYPICAL
from torch import Tensor

from .device import HostWait, SimulatedGPU
from .rig import PIECE_BYTES, Rig, finish, known
from .seams import small_pieces
from .tiny_models import LAYERS, TEXT_DIM, TinyModels

pytestmark = [pytest.mark.slow, pytest.mark.comfyui]
STEPS = 4
LIMIT_BYTES = 2**20  # of the card
# from where ComfyUI's functions are called, which wait as they please
CALLS_COMFYUI = ("around_runs.py _outer_sample", "around_runs.py <lambda>", "streamed_model.py _apply_model")


def sampled(rig: Rig, told: Callable[[], None]) -> Tensor:
    """A guided image, on the host. `told`: called behind each step."""
    import comfy.sample
    from qwenimage_lowvram.nodes.adapters.model import make_model

    transformer = QwenImageTransformer(
        rig.models.open("int8"), dtype=torch.bfloat16, hardware=rig.hardware, positions=Positions.COMFYUI
    )
    model = make_model(transformer, LIMIT_BYTES)
    noise = torch.randn(1, 16, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    prompts = [[[torch.randn(1, n, TEXT_DIM, generator=torch.Generator().manual_seed(n)), {}]] for n in (9, 5)]
    made: Tensor = comfy.sample.sample(
        model,
        noise,
        STEPS,
        4.0,
        "euler",
        "simple",
        *prompts,
        torch.zeros_like(noise),
        callback=lambda *progress: told(),
        seed=0,
        disable_pbar=True,
    ).cpu()
    model.detach()
    finish(transformer)
    return made


def test_comfyuis_sampler_makes_the_cpus_image_and_our_side_waits_for_nothing_younger_than_a_block(
    comfy: Any, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenimage_lowvram.nodes.adapters import around_runs

    steps: list[tuple[int, int]] = []
    with small_pieces(PIECE_BYTES), torch.inference_mode():
        on_host = Rig(tiny_models, None)
        monkeypatch.setattr(around_runs, "known_speeds", lambda *args: known(on_host, TYPICAL))
        wanted = sampled(on_host, lambda: None)
        with SimulatedGPU("late") as gpu:
            rig = Rig(tiny_models, gpu)
            monkeypatch.setattr(around_runs, "known_speeds", lambda *args: known(rig, TYPICAL))
            compute = gpu.compute_stream(rig.hardware.device)
            made = sampled(rig, lambda: steps.append((len(gpu.waits), compute.kernels)))
    assert not gpu.races
    assert torch.equal(made, wanted)
    assert len(steps) == STEPS
    (first, issued), (last, issued_at_last) = steps[0], steps[-1]
    block_kernels = (issued_at_last - issued) / (STEPS - 1) / LAYERS  # with what stands outside of the blocks
    ours = [wait for wait in gpu.waits[first:last] if is_ours(wait)]
    assert len(ours) >= STEPS * LAYERS  # the host keeps near the card
    assert [str(wait) for wait in ours if wait.kernels_since < 0.7 * block_kernels] == []


def is_ours(wait: HostWait) -> bool:
    """Whether the thread of the sampler waited in our code, and not in ComfyUI's, which that had called."""
    innermost = wait.site[0] if wait.site else ""
    return "host 0" in wait.thread and innermost != "" and not any(call in innermost for call in CALLS_COMFYUI)
