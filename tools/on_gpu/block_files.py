"""A transformer of few blocks of random weights in a file of each format. Made when it is first asked for."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from qwenimage_lowvram.engine.caches.requantized_weights import RequantizedWeights
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, open_checkpoint
from random_blocks import write_transformer
from torch import Tensor

from .cases import NUNCHAKU, W4A8, Sizes

FILE_BLOCKS = 2
# our names -> those of weights that our own loader quantizes
REQUANTIZED = {"int8": "int8", "nf4": "nf4", "fp4": "fp4", "fp8 scaled": "fp8_e4m3fn_scaled"}
_BLOCKS = "transformer_blocks."


class BlockFiles:
    """In `folder`, of a model of these sizes. Where the device is a GPU, it quantizes."""

    def __init__(self, folder: Path, sizes: Sizes, device: torch.device) -> None:
        self._folder, self._sizes, self._device = folder, sizes, device

    def open(self, stored: str) -> Checkpoint:
        """Raises ImportError where a package is missing that writes or reads it."""
        if stored in REQUANTIZED:
            weights = RequantizedWeights.of(open_checkpoint(self._bf16()), REQUANTIZED[stored], self._folder)
            assert weights is not None
            return weights.make(self._device)
        return open_checkpoint(self.path(stored))

    def path(self, stored: str) -> Path:
        """Of bf16, fp8, a GGUF type, nunchaku's int4, or what comfy-kitchen quantizes."""
        if stored == "bf16":
            return self._bf16()
        file = self._folder / f"{stored}{'.gguf' if stored.startswith('GGUF') else '.safetensors'}"
        if not file.exists():
            self._write(stored, file)
        return file

    def _bf16(self) -> Path:
        folder = self._folder / "bf16"
        if not folder.exists():
            made = write_transformer(
                self._folder / "unfinished",
                layers=FILE_BLOCKS,
                heads=self._sizes.heads,
                text_dim=self._sizes.text_dim,
                distinct=True,
            )
            made.parent.rename(folder)
        return folder

    def _write(self, stored: str, file: Path) -> None:
        from safetensors.torch import load_file

        weights = load_file(next(self._bf16().glob("*.safetensors")))
        config = json.loads((self._bf16() / "config.json").read_text(encoding="utf-8"))
        unfinished = file.with_name(f"unfinished {file.name}")
        if stored.startswith("GGUF"):
            from gguf_files import write_gguf_transformer

            write_gguf_transformer(unfinished, weights, config, stored.split()[1])
        elif stored == NUNCHAKU:
            from nunchaku_files import write_nunchaku_transformer

            write_nunchaku_transformer(unfinished, weights, config)
        else:
            self._write_safetensors(stored, weights, unfinished, json.dumps(config))
        unfinished.rename(file)

    def _write_safetensors(self, stored: str, weights: dict[str, Tensor], file: Path, config: str) -> None:
        from safetensors.torch import save_file

        parts: Callable[[str, Tensor], dict[str, Tensor]] = _as_fp8 if stored == "fp8" else self._by_kitchen(stored)
        made: dict[str, Tensor] = {}
        for name, weight in weights.items():
            made |= parts(name, weight) if _is_matrix(name, weight) else {name: weight}
        save_file(made, file, {"config": config})

    def _by_kitchen(self, kind: str) -> Callable[[str, Tensor], dict[str, Tensor]]:
        from comfy_files import quantized
        from kitchen_w4a8 import has_w4a8

        if kind == W4A8 and not has_w4a8():
            raise ImportError(f"needs comfy-kitchen 0.2.27 or newer, which has {W4A8}")

        def parts(name: str, weight: Tensor) -> dict[str, Tensor]:
            if "_mod." in name:
                return {name: weight}
            made = quantized(weight.to(self._device), kind)
            return {f"{name.removesuffix('weight')}{part}": value.cpu() for part, value in made.items()}

        return parts


def _as_fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    return {name: weight.to(torch.float8_e4m3fn)}


def _is_matrix(name: str, weight: Tensor) -> bool:
    return name.startswith(_BLOCKS) and weight.ndim == 2
