"""ComfyUI as the surroundings of the engine's runs: its interruption, its progress, and the memory it manages."""

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...engine.models.streamed_transformer import StreamedTransformer
from ...engine.runs.surroundings import Bar
from .limits import free_ram, host_bytes, stage_bytes
from .patcher import LowVRAMPatcher
from .progress import node_bar, progress_sender


class InComfyUI:
    """Of one run: `reused` is the MODEL or VAE it works with, `beside` are other people's that it needs as well."""

    def __init__(self, reused: ModelPatcher | None = None, beside: Sequence[ModelPatcher] = ()) -> None:
        self._reused, self._beside = reused, beside
        self._send = progress_sender()

    def check(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def bar(self) -> Bar:
        return node_bar()

    def tell(self, progress: Mapping[str, Any]) -> None:
        self._send(progress)

    def device_bytes(
        self, device: torch.device, limit_bytes: int | None, wanted_bytes: int, block_bytes: int = 0
    ) -> int:
        return stage_bytes(device, limit_bytes, wanted_bytes, block_bytes, reused=self._reused, beside=self._beside)

    def host_bytes(
        self, transformer: StreamedTransformer[Any, Any], limit_bytes: int | None, wanted_bytes: int, least_bytes: int
    ) -> int:
        return host_bytes(transformer, limit_bytes, wanted_bytes, least_bytes)

    def free_ram(self) -> int:
        return free_ram()

    def total_bytes(self, device: torch.device) -> int:
        return int(comfy.model_management.get_total_memory(device))

    def beside_bytes(self) -> int:
        return sum(int(other.loaded_size()) for other in self._beside)

    def left(self, device: torch.device) -> None:
        if isinstance(self._reused, LowVRAMPatcher):  # else what it gave back would count as free twice
            self._reused.model.model_loaded_weight_memory = self._reused.model.transformer.loaded_bytes
        comfy.model_management.soft_empty_cache()
