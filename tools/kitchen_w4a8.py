"""Whether the comfy-kitchen that is installed has the format asym_w4a8_int8."""

from qwenimage_lowvram.engine.formats.kitchen_w4a8 import load_w4a8


def has_w4a8() -> bool:
    try:
        load_w4a8()
    except (ImportError, AttributeError):
        return False
    return True
