"""How weights are stored: a list of formats, each of which tells itself from a file's header and decodes its bytes.

To add one: a file with its codec and a class of Format, and a line in FORMATS. Formats never move memory between
devices, and never compute with a weight.
"""

from .bnb4 import Bnb4
from .comfy_quant import ComfyQuant
from .format import Codec, Encoder, Format, HeldPart, Layout, StoredParam, decode_alone
from .gguf import Gguf
from .int8 import BnbInt8, Int8
from .int8_convrot import Int8Convrot
from .kitchen import Kitchen
from .kitchen_w4a8 import W4a8
from .nunchaku import Nunchaku
from .plain import TORCH_DTYPES, Plain, PlainCodec
from .registry import Formats
from .scaled_fp8 import ScaledFp8
from .scratch import Scratch

__all__ = [
    "CODECS",
    "COMFY_QUANT",
    "ENCODERS",
    "FORMATS",
    "TORCH_DTYPES",
    "Codec",
    "Encoder",
    "Format",
    "Formats",
    "HeldPart",
    "Layout",
    "Scratch",
    "StoredParam",
    "decode_alone",
    "described_tensors",
    "is_native",
    "is_plain",
    "raw_layout",
    "stored_param",
]

# those that ComfyUI's notes tell
_NOTED = (ScaledFp8(), Int8(), Int8Convrot(), Kitchen(), W4a8())
COMFY_QUANT = ComfyQuant(_NOTED)
# asked in this order; what may hold tensors of another comes before it
FORMATS = Formats((Bnb4(), BnbInt8(), Nunchaku(), COMFY_QUANT, *_NOTED, Gguf(), Plain()))

CODECS = FORMATS.codecs
ENCODERS = FORMATS.encoders
described_tensors = FORMATS.described_tensors
stored_param = FORMATS.stored_param
raw_layout = FORMATS.raw_layout


def is_native(param: StoredParam, compute: str) -> bool:
    """True where the stored bytes are the compute dtype's (`compute` is a format name such as "bf16")."""
    return param.codec == compute


def is_plain(param: StoredParam) -> bool:
    """True where decoding is a cast of each number by itself."""
    return isinstance(param.decoder, PlainCodec)
