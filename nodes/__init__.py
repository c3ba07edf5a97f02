"""The nodes, in ComfyUI's words. The only part of the pack that imports ComfyUI."""

from . import routes, words
from .decode import QwenLowVRAMDecode
from .encode import QwenLowVRAMEncodePrompts
from .encode_edit import QwenLowVRAMEncodeEditPrompt
from .loader import QwenLowVRAMLoader
from .lora import QwenLowVRAMLoadLora
from .memory_plan import QwenLowVRAMMemoryPlan
from .memory_report import QwenLowVRAMMemoryReport
from .sample import QwenLowVRAMSample
from .weight_cache import QwenLowVRAMWeightCache

routes.register()

NODE_CLASS_MAPPINGS = {
    "QwenLowVRAMLoader": QwenLowVRAMLoader,
    "QwenLowVRAMLoadLora": QwenLowVRAMLoadLora,
    "QwenLowVRAMEncodePrompts": QwenLowVRAMEncodePrompts,
    "QwenLowVRAMEncodeEditPrompt": QwenLowVRAMEncodeEditPrompt,
    "QwenLowVRAMSample": QwenLowVRAMSample,
    "QwenLowVRAMDecode": QwenLowVRAMDecode,
    "QwenLowVRAMMemoryPlan": QwenLowVRAMMemoryPlan,
    "QwenLowVRAMMemoryReport": QwenLowVRAMMemoryReport,
    "QwenLowVRAMWeightCache": QwenLowVRAMWeightCache,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "QwenLowVRAMLoader": words.LOADER,
    "QwenLowVRAMLoadLora": words.LOAD_LORA,
    "QwenLowVRAMEncodePrompts": words.ENCODE,
    "QwenLowVRAMEncodeEditPrompt": words.ENCODE_EDIT,
    "QwenLowVRAMSample": words.SAMPLE,
    "QwenLowVRAMDecode": words.DECODE,
    "QwenLowVRAMMemoryPlan": words.MEMORY_PLAN,
    "QwenLowVRAMMemoryReport": words.MEMORY_REPORT,
    "QwenLowVRAMWeightCache": words.WEIGHT_CACHE,
}
