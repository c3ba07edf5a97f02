"""Transformers of five tiny blocks in every kind of format, with LoRAs, and a text encoder with its vision tower."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import torch
from qwenimage_lowvram.engine.caches.requantized_weights import RequantizedWeights
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, open_checkpoint
from safetensors.torch import save_file
from torch import Tensor

LAYERS, HEADS, HEAD_DIM, TEXT_DIM = 5, 2, 32, 64
DIM = HEADS * HEAD_DIM
FP8_MOST = 448  # the largest number of float8_e4m3fn
REQUANTIZED = ("int8", "nf4")
# of each: the layers of a block that it changes, (rows, columns)
CHANGED = {
    "attn.to_q": (DIM, DIM),
    "img_mlp.net.2": (DIM, 4 * DIM),
    "txt_mlp.net.0.proj": (4 * DIM, DIM),
    "img_mod.1": (6 * DIM, DIM),
}


class TinyModels:
    """Files in one folder, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._make: Mapping[str, Callable[[Path], object]] = {
            "fp8": self._fp8,
            "scaled fp8": self._scaled_fp8,
            "w4a4": partial(self._quantized, "convrot_w4a4"),
            "nvfp4": partial(self._quantized, "nvfp4"),
            "mxfp8": partial(self._quantized, "mxfp8"),
            "w4a8": partial(self._quantized, "asym_w4a8_int8"),
            "GGUF": self._gguf,
            "nunchaku": self._nunchaku,
            "lora": self._lora,
            "dora": self._dora,
            "2.1": self._of_2_1,
        }

    def open(self, kind: str) -> Checkpoint:
        """The transformer in bf16, fp8, scaled fp8, int8, nf4, w4a4, w4a8, nvfp4, mxfp8, GGUF or nunchaku's int4; or
        its first two blocks in bf16."""
        if kind in ("bf16", "two blocks"):
            return open_checkpoint(self._saved(kind, LAYERS if kind == "bf16" else 2))
        if kind in REQUANTIZED:
            weights = RequantizedWeights.of(open_checkpoint(self._saved("bf16", LAYERS)), kind, self._folder)
            assert weights is not None
            return weights.make(torch.device("cpu"))
        return open_checkpoint(self.file(kind))

    def file(self, name: str) -> Path:
        file = self._folder / f"{name}{'.gguf' if name == 'GGUF' else '.safetensors'}"
        if not file.exists():
            self._make[name](file)
        return file

    @cache  # noqa: B019 - one object a session
    def text_encoder(self) -> Path:
        from small_checkpoint import TextSize, make_text_encoder, make_tokenizer

        size = TextSize(layers=4, vision_layers=4)
        encoder = make_text_encoder(make_tokenizer(full=False), size, seed=2).to(torch.bfloat16)
        encoder.save_pretrained(self._folder / "text_encoder")
        return self._folder / "text_encoder"

    def _saved(self, name: str, layers: int) -> Path:
        folder = self._folder / name
        if not folder.exists():
            self._model(layers).save_pretrained(folder)
        return folder

    @cache  # noqa: B019
    def _model(self, layers: int = LAYERS) -> torch.nn.Module:
        from small_checkpoint import make_transformer

        model = make_transformer(layers=layers, heads=HEADS, head_dim=HEAD_DIM, text_dim=TEXT_DIM)
        return model.to(torch.bfloat16)

    @property
    def _weights(self) -> dict[str, Tensor]:
        return {name: p.data for name, p in self._model().named_parameters()}

    def _fp8(self, file: Path) -> None:
        save_file({n: w.to(torch.float8_e4m3fn) if w.ndim == 2 else w for n, w in self._weights.items()}, file)

    def _scaled_fp8(self, file: Path) -> None:
        stored = dict(self._weights)
        for name, weight in self._weights.items():
            if weight.ndim == 2 and "transformer_blocks" in name:
                scale = weight.abs().max().float() / FP8_MOST
                stored[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
                stored[f"{name.removesuffix('.weight')}.scale_weight"] = scale
        save_file(stored, file)

    def _quantized(self, kind: str, file: Path) -> None:
        """In one of ComfyUI's formats, outside the blocks as well."""
        from comfy_files import quantized

        stored = dict(self._weights)
        for name, weight in self._weights.items():
            if weight.ndim == 2:
                layer = name.removesuffix(".weight")
                stored |= {f"{layer}.{part}": value for part, value in quantized(weight, kind).items()}
        save_file(stored, file)

    def _gguf(self, file: Path) -> None:
        from gguf_files import write_gguf_transformer

        write_gguf_transformer(file, self._weights, dict(self._model().config), "Q8_0", "Q4_0", "Q5_1")

    def _nunchaku(self, file: Path) -> None:
        """In int4, with as many dimensions as a tile has rows."""
        from nunchaku_files import write_nunchaku_transformer
        from small_checkpoint import make_transformer

        model = make_transformer(layers=LAYERS, heads=HEADS, head_dim=2 * HEAD_DIM, text_dim=TEXT_DIM)
        write_nunchaku_transformer(file, model.state_dict(), dict(model.config))

    def _of_2_1(self, file: Path) -> None:
        from small_transformer_21 import random_weights, write_file

        write_file(file, {name: weight.to(torch.bfloat16) for name, weight in random_weights().items()})

    def _lora(self, file: Path) -> None:
        from lora_files import make_parts, write_lora

        layers = {
            f"transformer_blocks.{i}.{name}": make_parts("lora", shape, seed=i)
            for i in range(LAYERS)
            for name, shape in CHANGED.items()
        }
        layers["txt_in"] = make_parts("lora", (DIM, TEXT_DIM), seed=LAYERS)
        write_lora(file, layers)

    def _dora(self, file: Path) -> None:
        from lora_files import make_parts, write_lora

        names = [f"transformer_blocks.{i}.attn.to_k" for i in range(LAYERS)]
        write_lora(file, {n: make_parts("lora", (DIM, DIM), seed=9 + i, dora="columns") for i, n in enumerate(names)})
