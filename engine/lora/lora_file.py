"""Read LoRA files of every trainer: which weights of a transformer they change, and how. Holds no matrix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch

from ..errors import DamagedFile, MissingFile, Unsupported, WrongModel
from ..files.checkpoint import TensorEntry, open_checkpoint
from ..files.json_texts import parse_json
from ..files.regular_file import open_regular, require_all_unchanged, require_unchanged
from ..formats import TORCH_DTYPES
from ..models.layer_rows import NO_OTHER_NAMES, OtherNames, shapes_by_any_name
from ..models.streamed_transformer import StreamedTransformer
from ..models.transformer_parts import TransformerParts
from ..texts import printable
from ..told import Told
from .deltas import Delta
from .key_names import COMFYUIS_KINDS, LayerNames, guess_model, is_of_half_shared_model, split_key, unsupported_kind
from .layers import LoraLayer, PeftSettings, peft_settings
from .row_cuts import placed

# where diffusers keeps PEFT's configuration in the metadata, as JSON
_SETTINGS = "lora_adapter_metadata"
_ALPHA_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8")

_Parts = dict[str, tuple[str, TensorEntry]]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it lies on disk. `identity` changes whenever its header, size or modification time does."""

    path: Path
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    identity: str

    def require_unchanged(self) -> None:
        """Raise DamagedFile where the file is another than the one that was opened, MissingFile where it is gone."""
        require_all_unchanged({entry.file: entry.stamp for entry in self.tensors.values() if entry.stamp is not None})


@dataclass(frozen=True)
class LoraMatch:
    """What a file changes in one transformer: a delta for each weight or bias, by its name, or where the transformer's
    file holds several layers in a weight, by the layer's.

    `unmatched`: the file's keys that have no part in it, such as those of a text encoder. `empty_layers`: those whose
    change has rank 0, which is none. `left_out_scales`: the least and the greatest scale (alpha / rank) that the file's
    metadata alone states, which diffusers applies, and ComfyUI and this engine do not; None where it states none.
    """

    lora: LoraFile
    deltas: Mapping[str, Delta] = field(repr=False)
    unmatched: tuple[str, ...] = field(repr=False)
    empty_layers: int = 0
    left_out_scales: tuple[float, float] | None = None

    @property
    def matched_keys(self) -> int:
        return len(self.lora.tensors) - len(self.unmatched)

    @property
    def unmatched_keys(self) -> int:
        return len(self.unmatched)

    @property
    def nbytes(self) -> int:
        """Of all stored parts."""
        return sum(delta.nbytes for delta in self.deltas.values())

    def __str__(self) -> str:
        return str(self.told())

    def told(self) -> Told:
        """As the node shows it, a sentence or two."""
        empty: Told | str = ""
        if self.empty_layers:
            empty = Told(
                " {layers} layer{plural} of rank 0 {change} nothing.",
                code="lora_report.empty_layers",
                layers=self.empty_layers,
                plural=_plural(self.empty_layers),
                change="changes" if self.empty_layers == 1 else "change",
            )
        return Told(
            "{used} of {keys} keys of {file} are used; they change {weights} weight{plural}.{empty}",
            code="lora_report.used",
            used=self.matched_keys,
            keys=len(self.lora.tensors),
            file=printable(self.lora.path.name),
            weights=len(self.deltas),
            plural=_plural(len(self.deltas)),
            empty=empty,
        )


def _plural(number: int) -> str:
    return "" if number == 1 else "s"


def open_lora(path: Path) -> LoraFile:
    """Index a LoRA file from its header alone. Raises MissingFile or DamagedFile."""
    checkpoint = open_checkpoint(path)
    return LoraFile(path, checkpoint.tensors, checkpoint.metadata, checkpoint.identity)


def needs_adapters(lora: LoraFile) -> bool:
    """Whether changes in the file are of kinds that ComfyUI computes, and this engine does not."""
    return any((kind := unsupported_kind(key)) is not None and kind[1] in COMFYUIS_KINDS for key in lora.tensors)


def match_model(lora: LoraFile, transformer: StreamedTransformer[Any, Any] | TransformerParts) -> LoraMatch:
    """Find what the file changes of a transformer, as `match`."""
    return match(lora, transformer.weights, transformer.other_names, model=transformer.model)


def match(
    lora: LoraFile,
    weights: Mapping[str, tuple[int, ...]],
    others: OtherNames = NO_OTHER_NAMES,
    *,
    model: str = "Qwen-Image",
) -> LoraMatch:
    """Find what the file changes among `weights`: names as diffusers' transformer has them, and shapes. `others`: names
    of layers that the weights hold joined or apart. `model`: in messages.

    Reads the alphas, a few bytes each. Raises WrongModel where nothing matches, where a shape does not fit, or where
    the other keys are another model's; Unsupported for kinds of changes that are not computed here; DamagedFile where
    a change is not whole.
    """
    shapes = shapes_by_any_name(weights, others)
    layers, unmatched = _sort_keys(lora, shapes)
    if not layers or is_of_half_shared_model(unmatched, shapes):
        raise _wrong_model(lora, unmatched, shapes, model)
    alphas = _read_alphas({name: parts["alpha"] for name, parts in layers.items() if "alpha" in parts})
    settings = _settings(lora)
    deltas: dict[str, Delta] = {}
    empty, left_out = 0, set[float]()
    for name, parts in layers.items():
        layer = LoraLayer(
            lora.path,
            name,
            {part: entry for part, (_, entry) in parts.items()},
            {part: key for part, (key, _) in parts.items()},
            alphas.get(name),
            settings,
            model,
        )
        if layer.is_empty:
            empty += 1
            continue
        made, used = layer.deltas(shapes)
        left_out.add(layer.left_out_scale)
        for delta in made:
            _put(deltas, placed(delta, weights, others, lora.path), lora.path)
        unmatched.extend(key for part, (key, _) in parts.items() if part not in used)
    if not deltas and empty:
        raise DamagedFile(
            "{file} changes nothing: all of its {empty} layers have rank 0. Download it again.",
            code="lora.changes_nothing",
            file=lora.path,
            empty=empty,
        )
    if not deltas:
        raise _wrong_model(lora, unmatched, shapes, model)
    scales = None if left_out == {1.0} else (min(left_out), max(left_out))
    return LoraMatch(lora, deltas, tuple(unmatched), empty, scales)


def _put(deltas: dict[str, Delta], made: Mapping[str, Delta], file: Path) -> None:
    """Raises Unsupported where a weight is changed as itself and as a part of another one."""
    doubled = sorted(deltas.keys() & made.keys())
    if doubled:
        raise Unsupported(
            "{file} changes {name} in two ways at once ({kinds}).",
            code="lora.two_ways_at_once",
            file=file,
            name=doubled[0],
            kinds=["by itself", "joined with another layer"],
        )
    deltas.update(made)


def _sort_keys(lora: LoraFile, weights: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, _Parts], list[str]]:
    """The parts of each layer, and the keys that belong to none."""
    names = LayerNames(weights, (split[0] for key in lora.tensors if (split := split_key(key)) is not None))
    layers: dict[str, _Parts] = {}
    unmatched = []
    for key, entry in lora.tensors.items():
        unsupported = unsupported_kind(key)
        if unsupported is not None and names.find(unsupported[0]) is not None:
            raise Unsupported(
                "{file} holds {kind} ({key!r:.199}), which is not supported. Use a LoRA, LoHa, LoKr or DoRA, or a "
                "file that was extracted as a LoRA.",
                code="lora.unsupported_kind",
                file=lora.path,
                kind=unsupported[1],
                key=key,
            )
        split = split_key(key)
        name = names.find(split[0]) if split is not None else None
        if split is None or name is None:
            unmatched.append(key)
            continue
        parts = layers.setdefault(name, {})
        if split[1] in parts:
            raise DamagedFile(
                "{file} holds the same part twice, as {first!r:.199} and as {second!r:.199}. Remove one.",
                code="lora.part_twice",
                file=lora.path,
                first=parts[split[1]][0],
                second=key,
            )
        parts[split[1]] = key, entry
    return layers, unmatched


def _read_alphas(entries: Mapping[str, tuple[str, TensorEntry]]) -> dict[str, float]:
    """By layer; in the order in which they lie in the file."""
    result: dict[str, float] = {}
    ordered = sorted(entries.items(), key=lambda item: item[1][1].offset)
    if not ordered:
        return result
    file, in_memory = ordered[0][1][1].file, ordered[0][1][1].data is not None
    try:
        with BytesIO() if in_memory else open_regular(file) as stream:
            if not in_memory:
                require_unchanged(stream, file, ordered[0][1][1].stamp)
            for name, (key, entry) in ordered:
                if prod(entry.shape) != 1 or entry.dtype not in _ALPHA_DTYPES:
                    raise DamagedFile(
                        "{file}: {key!r:.199} is {dtype}{shape}, not one number.",
                        code="lora.alpha_no_number",
                        file=file,
                        key=key,
                        dtype=entry.dtype,
                        shape=list(entry.shape),
                    )
                stream.seek(entry.offset)
                raw = bytearray(stream.read(entry.nbytes) if entry.data is None else entry.data)
                value = float(torch.frombuffer(raw, dtype=TORCH_DTYPES[entry.dtype])) if raw else float("nan")
                if not isfinite(value):
                    raise DamagedFile(
                        "{file}: {key!r:.199} is {value}. Download it again.",
                        code="lora.alpha_not_finite",
                        file=file,
                        key=key,
                        value=value,
                    )
                result[name] = value
    except OSError as error:
        raise MissingFile(
            "{file} cannot be read ({error}). Check that your user account may read it.",
            code="file.unreadable",
            file=file,
            error=error,
        ) from error
    return result


def _settings(lora: LoraFile) -> PeftSettings:
    return peft_settings(parse_json(lora.metadata.get(_SETTINGS, "{}"), f"{lora.path}: metadata key {_SETTINGS!r}"))


def _wrong_model(
    lora: LoraFile, unmatched: Sequence[str], weights: Mapping[str, tuple[int, ...]], model: str
) -> WrongModel:
    total = len(lora.tensors)
    if not any(split_key(key) or unsupported_kind(key) for key in lora.tensors):
        example = f", such as {next(iter(lora.tensors))!r:.199}" if lora.tensors else ""
        return WrongModel(
            "{file} is not a LoRA: none of its {total} keys is part of one{example}.",
            code="lora.is_none",
            file=lora.path,
            total=total,
            example=example,
        )
    guess = guess_model(unmatched, weights)
    made_for = f" It seems to be made for {guess}." if guess else ""
    return WrongModel(
        "{file}: {unmatched_count} of its {total} keys fit no layer of this transformer, such as "
        "{example!r:.199}.{made_for} Choose a LoRA for {model}.",
        code="lora.other_model",
        file=lora.path,
        unmatched_count=len(unmatched),
        total=total,
        example=unmatched[0],
        made_for=made_for,
        model=model,
    )
