"""The nodes, in ComfyUI's words. The only part of the pack that imports ComfyUI."""

from . import words
from .decode import QwenLowVRAMDecode
from .encode import QwenLowVRAMEncodePrompts
from .loader import QwenLowVRAMLoader
from .sample import QwenLowVRAMSample

NODE_CLASS_MAPPINGS = {
    "QwenLowVRAMLoader": QwenLowVRAMLoader,
    "QwenLowVRAMEncodePrompts": QwenLowVRAMEncodePrompts,
    "QwenLowVRAMSample": QwenLowVRAMSample,
    "QwenLowVRAMDecode": QwenLowVRAMDecode,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "QwenLowVRAMLoader": words.LOADER,
    "QwenLowVRAMEncodePrompts": words.ENCODE,
    "QwenLowVRAMSample": words.SAMPLE,
    "QwenLowVRAMDecode": words.DECODE,
}
