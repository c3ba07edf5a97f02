"""What stands beside a layer's weight: its scale, what says nothing of it, and what would change its meaning."""

from dataclasses import replace
from math import prod

from ..files.checkpoint import TensorEntry
from .format import StoredParam, Tensors

# what a scale is called beside `<layer>.weight`: older and newer ComfyUI files
SCALE_NAMES = ("scale_weight", "weight_scale")
# what may stand beside a quantized weight and says nothing of it: scales of what goes in and out
_OPERAND_SCALES = ("input_scale", "scale_input")
# no tensors: they stand for a note's `full_precision_matrix_mult`, and `linear_dtype` int8
FULL_PRODUCTS, EIGHT_BIT_OPERANDS = "full_products", "eight_bit_operands"
_MARKS = (FULL_PRODUCTS, EIGHT_BIT_OPERANDS)
_NOT_OF_THE_WEIGHT = ("weight", "bias", *_OPERAND_SCALES, "output_scale", "scale_output", *_MARKS)
_KNOWN = frozenset((*SCALE_NAMES, *_NOT_OF_THE_WEIGHT))
_WIDE = ("F32", "F16", "BF16")


def scales_beside(name: str, tensors: Tensors) -> list[str]:
    """What the scales of a layer's weight are called beside it."""
    layer = name.removesuffix(".weight")
    return [scale for scale in SCALE_NAMES if f"{layer}.{scale}" in tensors] if layer != name else []


def strangers_beside(name: str, tensors: Tensors) -> list[str]:
    """What a layer holds that would change its weight in a way that is not known: a second scale, or one of another
    meaning. Nothing where all is known."""
    layer = name.removesuffix(".weight")
    if layer == name:
        return []
    start = f"{layer}."
    beside = [other.removeprefix(start) for other in tensors if other.startswith(start)]
    others = [other for other in beside if other not in _KNOWN]
    narrow = tensors[name].dtype not in _WIDE
    return others if any(narrow or other.startswith("weight_") for other in others) else []


def only_scale(name: str, tensors: Tensors) -> TensorEntry | None:
    """The scale of a matrix, one number or one for each row, where nothing else would change its meaning."""
    scales, data = scales_beside(name, tensors), tensors[name]
    if len(scales) != 1 or strangers_beside(name, tensors):
        return None
    scale = tensors[f"{name.removesuffix('.weight')}.{scales[0]}"]
    return scale if is_scale(scale, data) else None


def stands_alone(name: str, tensors: Tensors) -> bool:
    """Whether a weight is all that its layer says of it."""
    return not scales_beside(name, tensors) and not strangers_beside(name, tensors)


def is_scale(scale: TensorEntry, data: TensorEntry) -> bool:
    """Whether the scale of a matrix is one number, or one for each row."""
    return scale.dtype in _WIDE and len(data.shape) == 2 and prod(scale.shape) in (1, data.shape[0])


def about_products(param: StoredParam, tensors: Tensors) -> StoredParam:
    """The parameter with what its layer says of products with it."""
    layer = param.name.removesuffix(".weight")
    found = [tensors[f"{layer}.{name}"] for name in _OPERAND_SCALES if f"{layer}.{name}" in tensors]
    scale = found[0] if len(found) == 1 and prod(found[0].shape) == 1 and found[0].dtype in _WIDE else None
    full, wide = (f"{layer}.{mark}" in tensors for mark in _MARKS)
    if not (scale or full or wide):
        return param
    return replace(param, operand_scale=scale, full_products=full, eight_bit_operands=wide)
