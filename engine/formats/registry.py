"""The formats that are tried, in their order: which one a parameter is stored in, and how its bytes lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..errors import WrongModel
from ..files.checkpoint import Checkpoint, TensorEntry
from ..texts import printable
from .format import Codec, Encoder, Format, Layout, StoredParam, Tensors
from .neighbours import about_products, scales_beside, strangers_beside

# of ComfyUI's formats, whose weights say nothing of themselves
_NOTED_DTYPES = ("I8", "U8")
_LOST_NOTES = "If ComfyUI quantized it, its notes (comfy_quant) were lost since: use the file as it was. "


@dataclass(frozen=True)
class Formats:
    """A list of formats. The first that recognises a parameter, or a part, has it."""

    formats: tuple[Format, ...]

    @cached_property
    def codecs(self) -> Mapping[str, Codec]:
        """By name, all of all formats."""
        return {codec.name: codec for format_ in self.formats for codec in format_.codecs}

    @cached_property
    def encoders(self) -> Mapping[str, Encoder]:
        """By name, what weights can be brought into."""
        return {encoder.name: encoder for format_ in self.formats for encoder in format_.encoders}

    @cached_property
    def _of_dtype(self) -> Mapping[str, tuple[Format, ...]]:
        """Those to ask, in their order."""
        dtypes = {dtype for format_ in self.formats for dtype in format_.dtypes}
        return {dtype: tuple(format_ for format_ in self.formats if dtype in format_.dtypes) for dtype in dtypes}

    def described_tensors(self, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
        """The tensors with what notes beside them tell of their formats. Reads notes, no weight.

        Raises DamagedFile, WrongModel or MissingPackage (see Format.describe).
        """
        tensors: Tensors = checkpoint.tensors
        for format_ in self.formats:
            tensors = format_.describe(tensors, checkpoint.metadata, checkpoint.path)
        return dict(tensors)

    def stored_param(self, name: str, tensors: Tensors, where: str) -> StoredParam:
        """The parameter `name` of `tensors` with the codec that its dtype and its neighbours' names call for.

        Raises WrongModel for a dtype or a quantization that no format here reads; `where` names the file.
        """
        for format_ in self._of_dtype.get(tensors[name].dtype, ()):
            param = format_.recognise(name, tensors)
            if param is not None:
                return about_products(param, tensors)
        beside = strangers_beside(name, tensors) or scales_beside(name, tensors)
        raise _unknown_format(where, name, tensors[name], beside)

    def raw_layout(self, part: TensorEntry) -> Layout:
        """How a part's bytes are seen as a tensor: its own dtype and shape, or the bytes of its blocks row by row.

        Raises WrongModel for a dtype that no format here has.
        """
        for format_ in self._of_dtype.get(part.dtype, ()):
            layout = format_.raw_layout(part)
            if layout is not None:
                return layout
        raise WrongModel(
            "{file} holds numbers in {dtype}, which is not supported.",
            code="format.unread_dtype",
            file=part.file,
            dtype=part.dtype,
        )

    def casts_fp8(self, part: TensorEntry) -> bool:
        """Whether decoding casts numbers in fp8."""
        return any(part.dtype in format_.fp8_dtypes for format_ in self._of_dtype.get(part.dtype, ()))


def _unknown_format(where: str, name: str, data: TensorEntry, beside: Sequence[str]) -> WrongModel:
    """The error for a parameter that no format has; `beside`: what its layer holds that says so."""
    if data.dtype == "F64":
        return WrongModel(
            "{where}: {name} is stored as {dtype}{shape}, which is not supported. Save the model in fp32, bf16 or "
            "fp16.",
            code="format.fp64",
            where=where,
            name=name,
            dtype=data.dtype,
            shape=list(data.shape),
        )
    scales = f" (beside it: {', '.join(map(printable, beside[:3])):.99})" if beside else ""
    lost = _LOST_NOTES if data.dtype in _NOTED_DTYPES and "weight_scale" in beside else ""
    return WrongModel(
        "{where}: {name} is stored as {dtype}{shape} in a quantization that is not supported{scales}. {lost}Use a "
        "bf16, fp16, fp32, fp8 or fp8-scaled file, one of ComfyUI's own formats (int8, convrot, nvfp4, mxfp8), GGUF, "
        "bitsandbytes (nf4, fp4, int8) or nunchaku.",
        code="format.unsupported",
        where=where,
        name=name,
        dtype=data.dtype,
        shape=list(data.shape),
        scales=scales,
        lost=lost,
    )
