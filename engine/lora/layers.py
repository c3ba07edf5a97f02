"""What a LoRA file's tensors of one layer make together: deltas of its weight and of its bias. Reads no file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from pathlib import Path
from typing import Any

from ..errors import DamagedFile, Unsupported, WrongModel
from ..files.checkpoint import TensorEntry
from .changes import Change, Hadamard, Kronecker, Matrix, Sum
from .deltas import Delta, Dora, Norm
from .key_names import PARTS_OF

# in which matrices may be stored
_DTYPES = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class PeftSettings:
    """What PEFT's configuration in a file's metadata says of scales, where the file has no alphas.

    diffusers computes with these scales; ComfyUI's LoRA loaders read no metadata, and so they are not applied here.
    """

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    root: bool = False

    def scale(self, layer: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) (rsLoRA); 1 where nothing is said. A name may be the end of a layer's."""
        own = (alpha for name, alpha in self.alphas.items() if f".{layer}".endswith(f".{name}"))
        alpha = next(own, self.alpha)
        return 1.0 if alpha is None else alpha / (sqrt(rank) if self.root else rank)


@dataclass(frozen=True)
class LoraLayer:
    """The tensors of one layer, by their parts' names, with the keys that the file has for them. model: that the LoRA
    is for, in messages."""

    file: Path
    name: str
    entries: Mapping[str, TensorEntry]
    keys: Mapping[str, str]
    alpha: float | None
    settings: PeftSettings
    model: str

    @property
    def is_empty(self) -> bool:
        """A LoRA of rank 0, as tools that shrink each layer by its own leave it: the product of nothing."""
        ends = [self.entries.get(part) for part in PARTS_OF["LoRA"]]
        if len(ends) != len(self.entries.keys() - {"alpha"}) or any(end is None for end in ends):
            return False
        up, down = (end.shape for end in ends if end is not None)
        return len(up) > 1 and prod(up) == prod(down) == 0 and up[1] == down[0] == 0

    @property
    def left_out_scale(self) -> float:
        """What the metadata alone says of a LoRA's scale; 1 where it says nothing, or an alpha stands in the file."""
        down = self.entries.get("down")
        return 1.0 if down is None or self.alpha is not None else self.settings.scale(self.name, down.shape[0])

    def deltas(self, weights: Mapping[str, tuple[int, ...]]) -> tuple[list[Delta], set[str]]:
        """Its deltas, none or one for the weight and for the bias; and the parts that they are made of.

        Raises WrongModel where a shape does not fit, DamagedFile where a part is missing or damaged, Unsupported for
        two changes of one weight.
        """
        deltas: list[Delta] = []
        used: set[str] = set()
        scale = 1.0
        kind = self._only([kind for kind, parts in PARTS_OF.items() if any(part in self.entries for part in parts)])
        if kind is not None:
            change, scale = self._change(kind)
            dora = None if kind == "diff" else self._dora(change)
            used.update(part for part in PARTS_OF[kind] if part in self.entries)
            used.update(["alpha"] if kind != "diff" and self.alpha is not None else [])
            used.update(part for part in ("dora_scale", "magnitude") if dora is not None and part in self.entries)
            deltas.append(self._delta(f"{self.name}.weight", change, scale, dora, weights))
        bias = self._only([part for part in ("diff_b", "up_bias") if part in self.entries])
        if bias is not None and f"{self.name}.bias" in weights:
            change = Sum(Matrix((self._matrix(bias),)))
            # PEFT scales the bias of lora_B as it does the product
            bias_scale = scale if bias == "up_bias" else 1.0
            deltas.append(self._delta(f"{self.name}.bias", change, bias_scale, None, weights))
            used.add(bias)
        return deltas, used

    def _only(self, kinds: Sequence[str]) -> str | None:
        if len(kinds) > 1:
            raise Unsupported(
                "{file} changes {name} in two ways at once ({kinds}).",
                code="lora.two_ways_at_once",
                file=self.file,
                name=self.name,
                kinds=kinds,
            )
        return kinds[0] if kinds else None

    def _change(self, kind: str) -> tuple[Change, float]:
        """The change, and alpha / rank: 1 without an alpha."""
        if kind == "diff":
            return Sum(Matrix((self._matrix("diff"),))), 1.0
        if kind == "LoRA":
            product = self._product("up", "down")
            return Sum(product), self._scale(product.shared)
        if kind == "LoHa":
            first, second = self._product("hada_w1_a", "hada_w1_b"), self._product("hada_w2_a", "hada_w2_b")
            if first.shape != second.shape:
                raise self._damaged(
                    "hada_w1_a",
                    "makes {shape}, but its second product makes {second_shape}",
                    code="lora.products_differ",
                    shape=first.shape,
                    second_shape=second.shape,
                )
            return Hadamard(first, second), self._scale(first.shared)
        outer, inner = (
            Matrix((self._matrix(name),)) if name in self.entries else self._product(f"{name}_a", f"{name}_b")
            for name in ("lokr_w1", "lokr_w2")
        )
        # an alpha belongs to a rank; where neither matrix is a product there is none (comfy/weight_adapter/lokr.py)
        rank = next((matrix.shared for matrix in (inner, outer) if matrix.is_product), None)
        return Kronecker(outer, inner), 1.0 if rank is None else self._scale(rank)

    def _scale(self, rank: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / rank

    def _product(self, left: str, right: str) -> Matrix:
        matrix = Matrix((self._matrix(left), self._matrix(right)))
        if matrix.entries[0].shape[1] != matrix.shared:
            shapes = [list(entry.shape) for entry in matrix.entries]
            raise self._damaged(
                left,
                "is {shape} and {second_key!r} {second_shape}, which cannot be multiplied",
                code="lora.no_product",
                shape=shapes[0],
                second_key=self.keys[right],
                second_shape=shapes[1],
            )
        return matrix

    def _matrix(self, part: str) -> TensorEntry:
        """A stored part as (rows, columns): a kernel of one pixel is a matrix, a vector one of one column."""
        entry = self.entries.get(part)
        if entry is None:
            present = next(iter(self.keys.values()))
            raise DamagedFile(
                "{file} has {present!r:.199}, but not its part {part!r}. Download it again.",
                code="lora.part_missing",
                file=self.file,
                present=present,
                part=part,
            )
        if not entry.shape or prod(entry.shape) == 0:
            raise self._damaged(part, "has shape {shape}", code="lora.empty_part", shape=list(entry.shape))
        if entry.dtype not in _DTYPES:
            raise Unsupported(
                "{file}: {key!r:.199} is stored as {dtype}. Use a LoRA in bf16, fp16 or fp32.",
                code="lora.unread_dtype",
                file=self.file,
                key=self.keys[part],
                dtype=entry.dtype,
            )
        return replace(entry, shape=(entry.shape[0], prod(entry.shape[1:])))

    def _dora(self, change: Change) -> Dora | None:
        part = next((part for part in ("dora_scale", "magnitude") if part in self.entries), None)
        if part is None:
            return None
        rows, columns = change.shape
        stored = self._matrix(part)
        if stored.shape == (rows, 1):
            norm = Norm.ROW if part == "magnitude" else Norm.ROW_OF_BASE
        elif part == "dora_scale" and self.entries[part].shape in ((1, columns), (columns,)):
            norm = Norm.COLUMN
        else:
            shape = list(self.entries[part].shape)
            raise self._damaged(
                part,
                "has shape {shape}, which fits neither the rows nor the columns of {rows}x{columns}",
                code="lora.wrong_dora_scale",
                shape=shape,
                rows=rows,
                columns=columns,
            )
        return Dora(replace(stored, shape=(prod(stored.shape),)), norm)

    def _delta(
        self, weight: str, change: Change, scale: float, dora: Dora | None, weights: Mapping[str, tuple[int, ...]]
    ) -> Delta:
        shape = weights[weight]
        if (shape[0], prod(shape[1:])) != change.shape:
            raise WrongModel(
                "{file} changes {weight} by a matrix of {shape}; this model's is {model_shape}. It was made for "
                "another model, or another size of it: choose a LoRA for {model}.",
                code="lora.other_size",
                file=self.file,
                weight=weight,
                shape=list(change.shape),
                model_shape=list(shape),
                model=self.model,
            )
        return Delta(weight, shape, change, scale, dora)

    def _damaged(self, part: str, what: str, *, code: str, **values: Any) -> DamagedFile:
        return DamagedFile(
            f"{{file}}: {{key!r:.199}} {what}. Download it again.",
            code=code,
            file=self.file,
            key=self.keys[part],
            **values,
        )


def peft_settings(given: Mapping[str, Any]) -> PeftSettings:
    """From PEFT's configuration as diffusers writes it: alone, or with "transformer." before each setting's name."""
    settings = {name.removeprefix("transformer."): value for name, value in given.items()}
    alphas = settings.get("alpha_pattern")
    named = alphas.items() if isinstance(alphas, Mapping) else ()
    return PeftSettings(
        _number(settings.get("lora_alpha")),
        # patterns are layers' names in practice; anything more is not read as a pattern
        {name.removeprefix("^"): number for name, value in named if (number := _number(value)) is not None},
        settings.get("use_rslora") is True,
    )


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < 1e30 else None
