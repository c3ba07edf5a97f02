"""A note of ComfyUI's beside a weight that it quantized, and what a format that such notes tell has to say of one."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DamagedFile, MissingPackage, WrongModel
from ..files.checkpoint import TensorEntry
from .format import Format, Tensors

# neighbours of a row that are rotated together: comfy-kitchen knows powers of four, ComfyUI's files have 256 and, in
# narrow layers, less
GROUPS = (16, 64, 256, 1024)
GROUP = 256  # where a rotated layer's note names none


@dataclass(frozen=True)
class Note:
    """What a note says of one layer of `tensors`: a table such as `{"format": "int8_tensorwise", "convrot": true}`."""

    layer: str
    tensors: Tensors
    settings: Mapping[str, Any]

    @property
    def entry(self) -> TensorEntry:
        """The weight as the file has it."""
        return self.tensors[f"{self.layer}.weight"]

    @property
    def where(self) -> str:
        """The weight in errors."""
        return f"{self.entry.file}: {f'{self.layer}.weight'!r}"

    @property
    def kind(self) -> str:
        """Raises DamagedFile where the note names no format."""
        kind = self.settings.get("format")
        if not isinstance(kind, str):
            raise DamagedFile(
                "{where} has a quantization note without a format. Download it again.",
                code="comfy_quant.no_format",
                where=self.where,
            )
        return kind

    def part(self, name: str) -> TensorEntry | None:
        """What lies beside the weight under that name."""
        return self.tensors.get(f"{self.layer}.{name}")

    def setting(self, key: str, default: Any) -> Any:
        """From the note, or from its "params"."""
        params = self.settings.get("params")
        return {**(params if isinstance(params, dict) else {}), **self.settings}.get(key, default)

    def weight_as(self, dtype: str, shape: tuple[int, ...] | None = None) -> Tensors:
        """The weight under the dtype that its format is told by, in its logical shape (None: as it is)."""
        entry = self.entry
        return {f"{self.layer}.weight": replace(entry, dtype=dtype, shape=entry.shape if shape is None else shape)}

    def broken(self, scales: str = "scales") -> DamagedFile:
        """The error for tensors that are not what the note promises."""
        entry = self.entry
        return DamagedFile(
            "{where} ({dtype}{shape}) and its {scales} do not match its quantization note ({kind}). Download it again.",
            code="comfy_quant.broken",
            where=self.where,
            dtype=entry.dtype,
            shape=list(entry.shape),
            scales=scales,
            kind=self.kind,
        )

    def require_scaled(self, dtype: str) -> None:
        """Raise DamagedFile where the weight is not stored so, beside a scale."""
        if self.entry.dtype != dtype or self.part("weight_scale") is None:
            raise self.broken("scale")

    def rotation(self) -> int | None:
        """The group of a layer that its note calls rotated, else None."""
        return self.group() if self.setting("convrot", False) else None

    def group(self) -> int:
        """How many neighbours of a row are rotated together. Raises DamagedFile, WrongModel for another than GROUPS."""
        group = self.setting("convrot_groupsize", GROUP)
        if type(group) is not int:
            raise DamagedFile(
                "{where} is rotated in groups of {group!r:.99}, which is not a number. Download it again.",
                code="comfy_quant.group_no_number",
                where=self.where,
                group=group,
            )
        if group not in GROUPS:
            raise WrongModel(
                "{where} is rotated in groups of {group}, which is not supported. Use a file with groups of {groups} "
                "(ComfyUI's default is {default}), or one without convrot.",
                code="comfy_quant.unsupported_group",
                where=self.where,
                group=group,
                groups=[*map(str, GROUPS)],
                default=GROUP,
            )
        return group

    def require_rotated(self, group: int, shape: tuple[int, ...]) -> None:
        """Raise DamagedFile where rows of a weight of `shape` cannot be rotated in such groups."""
        if len(shape) != 2 or shape[1] % group:
            raise DamagedFile(
                "{where} {shape} cannot be rotated in groups of {group}. Download it again.",
                code="comfy_quant.cannot_be_rotated",
                where=self.where,
                shape=list(shape),
                group=group,
            )


class NotedFormat(Format):
    """A format that notes of ComfyUI's tell.

    notes: what they call it.
    """

    notes: tuple[str, ...] = ()

    def noted(self, note: Note) -> Tensors | None:
        """What replaces the layer's tensors, None where the note, though it calls it so, means another format.

        Raises DamagedFile where the note and its tensors disagree, WrongModel for what is not read.
        """
        raise NotImplementedError

    def require_packages(self, dtypes: Collection[str], path: Path) -> None:
        """Raise MissingPackage where tensors of one of `dtypes` cannot be decoded here; `path` names the model."""


def require_comfy_kitchen(path: Path, what: str, version: str, load: Callable[[], Any]) -> None:
    """Raise MissingPackage where `load`, which asks comfy-kitchen for what decodes, fails."""
    try:
        load()
    except (ImportError, AttributeError) as error:
        raise MissingPackage(
            "{file} holds {what}, which need the package comfy-kitchen, {version} or newer ({error}). Install it with "
            "`pip install comfy-kitchen`, update ComfyUI, which brings it, or use a file in bf16, fp8 or int8 without "
            "convrot.",
            code="package.comfy_kitchen",
            file=path,
            what=what,
            version=version,
            error=error,
        ) from error
