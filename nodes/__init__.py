"""The nodes, in ComfyUI's words. The only part of the pack that works with ComfyUI."""

from typing import Any

from . import display_names, routes
from .adapters.error_events import errors_sent
from .card_benchmark import QwenLowVRAMBenchmark
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

NODE_CLASS_MAPPINGS: dict[str, Any] = {
    "QwenLowVRAMLoader": QwenLowVRAMLoader,
    "QwenLowVRAMLoadLora": QwenLowVRAMLoadLora,
    "QwenLowVRAMEncodePrompts": QwenLowVRAMEncodePrompts,
    "QwenLowVRAMEncodeEditPrompt": QwenLowVRAMEncodeEditPrompt,
    "QwenLowVRAMSample": QwenLowVRAMSample,
    "QwenLowVRAMDecode": QwenLowVRAMDecode,
    "QwenLowVRAMMemoryPlan": QwenLowVRAMMemoryPlan,
    "QwenLowVRAMMemoryReport": QwenLowVRAMMemoryReport,
    "QwenLowVRAMWeightCache": QwenLowVRAMWeightCache,
    "QwenLowVRAMBenchmark": QwenLowVRAMBenchmark,
}
for _node in NODE_CLASS_MAPPINGS.values():
    setattr(_node, _node.FUNCTION, errors_sent()(getattr(_node, _node.FUNCTION)))

NODE_DISPLAY_NAME_MAPPINGS = {
    "QwenLowVRAMLoader": display_names.LOADER,
    "QwenLowVRAMLoadLora": display_names.LOAD_LORA,
    "QwenLowVRAMEncodePrompts": display_names.ENCODE,
    "QwenLowVRAMEncodeEditPrompt": display_names.ENCODE_EDIT,
    "QwenLowVRAMSample": display_names.SAMPLE,
    "QwenLowVRAMDecode": display_names.DECODE,
    "QwenLowVRAMMemoryPlan": display_names.MEMORY_PLAN,
    "QwenLowVRAMMemoryReport": display_names.MEMORY_REPORT,
    "QwenLowVRAMWeightCache": display_names.WEIGHT_CACHE,
    "QwenLowVRAMBenchmark": display_names.BENCHMARK,
}
