"""One of two cards fails in the middle of a step: the error names it, and nothing is left on either."""

import gc

import pytest
import torch
from qwenimage_lowvram.engine.errors import DeviceFailed
from qwenimage_lowvram.engine.models.qwen_image.branch import BranchState

from . import seams
from .branches_beside import several
from .device import SimulatedGPU
from .rig import TIMES, Rig, finish
from .tiny_models import TinyModels


def test_the_error_names_the_card_and_nothing_is_left(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    run = BranchState.run

    def fail(state: BranchState, index: int, block: torch.nn.Module) -> None:
        if index == 2 and str(state.img.device) == "cuda:1":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        run(state, index, block)

    monkeypatch.setattr(BranchState, "run", fail)
    gpu = SimulatedGPU("late")
    with gpu:
        rig = Rig(tiny_models, gpu)
        model = rig.transformer("bf16")
        assert rig.other is not None
        beside = seams.beside(model, rig.other.device, (0,), 1)
        model.load((0,), (1,), beside=beside)
        model.modulation.announce(TIMES[:1])
        with (
            pytest.raises(DeviceFailed, match=r"cuda:1 failed .* illegal memory access"),
            model.session(slots=2, branches=1, beside=beside) as session,
        ):
            session.forward(several(rig, TIMES[0], 1, False))
        finish(model)
        del session
        gc.collect()
        gpu.accelerator.synchronize()
    assert not gpu.races
    assert not gpu.allocator.allocated_bytes
    assert not len(gpu.page_locks)
