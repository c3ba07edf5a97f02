"""LoRA files as the trainers write them, with random matrices, and what each adds to its weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Style:
    """How a trainer spells a key: prefix, layer (with underscores if `flat`), and the ends of LoRA's two matrices.

    comfyui, diffusers: which of them reads the style right. newer: diffusers does from 0.40 on at the earliest.
    """

    prefix: str
    down: str
    up: str
    alpha: bool
    flat: bool = False
    comfyui: bool = True
    diffusers: bool = True
    newer: bool = False

    def key(self, layer: str, part: str) -> str:
        name = layer.replace(".", "_") if self.flat else layer
        return f"{self.prefix}{name}{ {'up': self.up, 'down': self.down}.get(part, f'.{part}') }"


_DOWN_UP = (".lora_down.weight", ".lora_up.weight")
_A_B = (".lora_A.weight", ".lora_B.weight")
_OLD = (".lora.down.weight", ".lora.up.weight")

STYLES: Mapping[str, Style] = {
    "Lightning": Style("", *_DOWN_UP, True),
    "Lightning without alpha": Style("", *_DOWN_UP, False, diffusers=False),
    "ai-toolkit": Style("diffusion_model.", *_A_B, False),
    "ai-toolkit with alpha": Style("diffusion_model.", *_A_B, True, newer=True),
    "diffusion_model, down and up": Style("diffusion_model.", *_DOWN_UP, True),
    "diffusion_model, down and up without alpha": Style("diffusion_model.", *_DOWN_UP, False, newer=True),
    "musubi-tuner": Style("lora_unet_", *_DOWN_UP, True, flat=True),
    "musubi-tuner without alpha": Style("lora_unet_", *_DOWN_UP, False, flat=True, newer=True),
    "diffusers": Style("transformer.", *_A_B, False),
    "diffusers with alpha": Style("transformer.", *_A_B, True, diffusers=False),
    "OneTrainer": Style("transformer.", *_DOWN_UP, True, diffusers=False),
    "OneTrainer without alpha": Style("transformer.", *_DOWN_UP, False, diffusers=False),
    "OneTrainer, older": Style("lora_transformer_", *_DOWN_UP, True, flat=True, comfyui=False, diffusers=False),
    "DiffSynth-Studio": Style("", ".lora_A.default.weight", ".lora_B.default.weight", False),
    "DiffSynth-Studio with alpha": Style("", ".lora_A.default.weight", ".lora_B.default.weight", True, newer=True),
    "DiffSynth-Studio, whole pipeline": Style("pipe.dit.", *_A_B, False, comfyui=False, diffusers=False),
    "bare A and B": Style("", *_A_B, False, diffusers=False),
    "bare A and B with alpha": Style("", *_A_B, True, newer=True),
    "bare A and B, no ending": Style("", ".lora_A", ".lora_B", False, diffusers=False),
    "SimpleTuner LyCORIS": Style("lycoris_", *_DOWN_UP, True, flat=True, diffusers=False),
    "SimpleTuner LyCORIS without alpha": Style("lycoris_", *_DOWN_UP, False, flat=True, diffusers=False),
    "PEFT": Style("base_model.model.", *_A_B, False, comfyui=False, diffusers=False),
    "PEFT, adapter named": Style(
        "base_model.model.", ".lora_A.my-style.weight", ".lora_B.my-style.weight", True, comfyui=False, diffusers=False
    ),
    "PEFT in a pipeline": Style("base_model.model.transformer.", *_A_B, False, comfyui=False, diffusers=False),
    "whole checkpoint's prefix": Style("model.diffusion_model.", *_A_B, True, comfyui=False, diffusers=False),
    "older diffusers": Style("transformer.", *_OLD, False),
    "older diffusers with alpha": Style("transformer.", *_OLD, True, diffusers=False),
    "torch.compile": Style("_orig_mod.", *_A_B, False, comfyui=False, diffusers=False),
    "a distillation's student": Style("student.transformer.", *_A_B, True, comfyui=False, diffusers=False),
    "musubi-tuner, dotted": Style("lora_unet.", *_DOWN_UP, True, comfyui=False, diffusers=False),
    "flat, ComfyUI's": Style("lora_diffusion_model_", *_DOWN_UP, True, flat=True, comfyui=False, diffusers=False),
    "flat, diffusers'": Style("transformer_", *_DOWN_UP, True, flat=True, comfyui=False, diffusers=False),
    "flat, bare": Style("", *_DOWN_UP, True, flat=True, comfyui=False, diffusers=False),
    "oldest diffusers": Style("transformer.", "_lora.down.weight", "_lora.up.weight", True, diffusers=False),
}  # fmt: skip

KINDS = ("lora", "loha", "lokr", "lokr, outer product", "lokr, inner product", "lokr, both products", "diff")
DORA = ("rows", "columns")


def make_parts(kind: str, shape: Sequence[int], *, rank: int = 4, seed: int = 0, dora: str | None = None) -> Parts:
    """Random parts of a change of a weight of `shape`, by the names of ComfyUI's keys ("up" and "down" for LoRA's).

    Entries of the change are about as large as those of a weight. No alpha. Magnitudes lie around those of a weight
    whose rows have norm 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    rows, columns = shape
    scale = columns**-0.5
    if kind == "lora":
        parts = {"up": random(rows, rank) * (scale * rank**-0.5), "down": random(rank, columns)}
    elif kind == "loha":
        parts = {
            "hada_w1_a": random(rows, rank) * (scale / rank),
            "hada_w1_b": random(rank, columns),
            "hada_w2_a": random(rows, rank),
            "hada_w2_b": random(rank, columns),
        }
    elif kind == "diff":
        parts = {"diff": random(rows, columns) * scale}
    else:
        (a, c), (b, d) = _factors(rows), _factors(columns)
        parts = {}
        for name, (height, width), is_product, size in (
            ("lokr_w1", (a, b), kind in ("lokr, outer product", "lokr, both products"), 1.0),
            ("lokr_w2", (c, d), kind in ("lokr, inner product", "lokr, both products"), scale),
        ):
            if is_product:
                own_rank = rank + (name == "lokr_w1")  # two ranks: alpha goes by the second one's
                parts[f"{name}_a"] = random(height, own_rank) * (size * own_rank**-0.5)
                parts[f"{name}_b"] = random(own_rank, width)
            else:
                parts[name] = random(height, width) * size
    if dora == "rows":
        parts["dora_scale"] = random(rows, 1).mul_(0.1).add_(1)
    elif dora == "columns":
        parts["dora_scale"] = random(1, columns).mul_(0.1).add_((rows / columns) ** 0.5)
    return parts


def change_of(parts: Parts) -> Tensor:
    """The matrix that the parts make, alpha included, in fp64; for a DoRA without its normalisation."""
    p = {name: part.double() for name, part in parts.items()}
    alpha = float(p["alpha"]) if "alpha" in p else None

    def scaled(matrix: Tensor, rank: int | None) -> Tensor:
        return matrix if alpha is None or rank is None else matrix * (alpha / rank)

    if "up" in p:
        return scaled(p["up"] @ p["down"], len(p["down"]))
    if "hada_w1_a" in p:
        product = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
        return scaled(product, len(p["hada_w1_b"]))
    if "diff" in p:
        return p["diff"]
    outer = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    inner = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
    rank = next((len(p[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in p), None)
    return scaled(torch.kron(outer, inner), rank)


def write_lora(
    file: Path,
    layers: Mapping[str, Parts],
    style: str | Style = "ai-toolkit",
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write parts by layer (such as "img_in"); matrices in `dtype`. Alphas are left out where the style has none."""
    spelled = STYLES[style] if isinstance(style, str) else style
    tensors = {
        spelled.key(layer, part): (tensor if part == "alpha" else tensor.to(dtype)).contiguous()
        for layer, parts in layers.items()
        for part, tensor in parts.items()
        if part != "alpha" or spelled.alpha
    }
    save_file(tensors, file, metadata=dict(metadata) if metadata else None)
    return file


def _factors(dimension: int) -> tuple[int, int]:
    """The divisors nearest to each other, the smaller first, as trainers cut a dimension for LoKr."""
    small = max(n for n in range(1, int(dimension**0.5) + 1) if dimension % n == 0)
    return small, dimension // small
