"""Runs the engine on a SimulatedGPU and on the CPU, and says what differs: bits, races, and what was left behind."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from qwenimage_lowvram.engine.compute.linear_choice import DECODED, LinearChoice
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.lora_file import match, open_lora
from qwenimage_lowvram.engine.lora.weight_patches import lora_patches
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.qwen_image_21.transformer import QwenImage21Transformer
from qwenimage_lowvram.engine.planning.forecast import Speeds
from qwenimage_lowvram.engine.runs.known_speeds import KnownSpeeds
from torch import Tensor

from . import seams
from .device import SimulatedGPU
from .tiny_models import DIM, LAYERS, TEXT_DIM, TinyModels

TIMES = (1.0, 0.5)
IMAGE = (1, 3, 4)  # frames, height and width in patches
PROMPT_TOKENS = (7, 5)  # the second where there are two
PIECE_BYTES = 16384  # so that tiny blocks pass through the ring in several pieces

Lora = Sequence[tuple[str, float]]


@dataclass
class Rig:
    """What a scenario is given. `gpu` None: it runs on the CPU, for the bits that are to come out."""

    models: TinyModels
    gpu: SimulatedGPU | None
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def hardware(self) -> Hardware:
        return Hardware.detect(torch.device("cpu")) if self.gpu is None else self.gpu.hardware(**self.changes)

    @property
    def other(self) -> Hardware | None:
        """A second card; none on the CPU."""
        return None if self.gpu is None else self.gpu.hardware(1)

    def transformer(
        self, kind: str, *, lora: Lora = (), dtype: torch.dtype = torch.bfloat16, linear: LinearChoice = DECODED
    ) -> QwenImageTransformer:
        others = [] if self.other is None else [self.other]
        model = QwenImageTransformer(
            self.models.open(kind), dtype=dtype, hardware=self.hardware, others=others, linear=linear
        )
        if lora:
            self.patch(model, lora)
        return model

    def transformer_21(self, dtype: torch.dtype = torch.bfloat16) -> QwenImage21Transformer:
        checkpoint = open_checkpoint(self.models.file("2.1"))
        return QwenImage21Transformer(checkpoint, dtype=dtype, hardware=self.hardware)

    def patch(self, model: QwenImageTransformer, lora: Lora) -> None:
        stack = [(match(open_lora(self.models.file(name)), model.weights), strength) for name, strength in lora]
        model.patch(lora_patches(stack))

    def branches(
        self,
        timestep: float,
        *,
        residuals: bool = False,
        prompts: int = 1,
        image_shape: tuple[int, int, int] = IMAGE,
        dtype: torch.dtype = torch.bfloat16,
    ) -> list[Branch]:
        """Prompts for one image."""
        generator = torch.Generator().manual_seed(int(timestep * 1000))
        device = self.hardware.device

        def draw(*shape: int) -> Tensor:
            return torch.randn(1, *shape, generator=generator).to(dtype).to(device)

        tokens = prod(image_shape)
        image = draw(tokens, 64)
        added: tuple[Any, ...] = ()
        if residuals:  # of two ControlNets, one for the first blocks alone; references get none
            n = tokens - 2
            added = ([draw(n, DIM) for _ in range(LAYERS)], [None, draw(n, DIM)])
        return [
            Branch(image, (image_shape,), draw(n, TEXT_DIM), None, timestep, residuals=added)
            for n in PROMPT_TOKENS[:prompts]
        ]


Scenario = Callable[[Rig], list[Tensor]]


def host(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.cpu() for tensor in tensors]


def finish(model: QwenImageTransformer) -> None:
    model.unload()
    model.store.set_held(())
    model.modulation.forget()  # its rows are page-locked


def known(rig: Rig, speeds: Speeds) -> KnownSpeeds:
    """What is thought of the machine, before it is measured."""
    found = KnownSpeeds(rig.hardware, torch.bfloat16, Path("/"), file=None, device_name="simulated")
    found.put(speeds)
    return found


def expected(scenario: Scenario, models: TinyModels) -> list[Tensor]:
    with seams.small_pieces(PIECE_BYTES):
        return scenario(Rig(models, None))


def findings(
    scenario: Scenario, models: TinyModels, wanted: Sequence[Tensor], gpu: SimulatedGPU, **changes: Any
) -> list[str]:
    """What is wrong with the scenario on that GPU, in words; empty if nothing is. `changes`: of its Hardware."""
    made: list[Tensor] = []
    error_text = ""
    with gpu, seams.small_pieces(PIECE_BYTES):
        try:
            made = host(scenario(Rig(models, gpu, changes)))
        except Exception as error:
            error_text = f"{type(error).__name__}: {error}"
        gc.collect()  # what the error's traceback held is given back while the GPU is there
        seams.forget_tables()
        gpu.accelerator.synchronize()
    if error_text:
        return [error_text]
    found = list(dict.fromkeys(gpu.races))
    if len(made) != len(wanted) or not all(map(torch.equal, made, wanted)):
        found.append("the result is another than the CPU's")
    if gpu.allocator.allocated_bytes:
        found.append(f"{gpu.allocator.allocated_bytes} bytes of device memory are left")
    if len(gpu.page_locks):
        found.append(f"{len(gpu.page_locks)} page-locked buffers are left")
    return found
