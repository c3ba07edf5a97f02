"""ComfyUI-QwenImage-LowVRAM: Qwen-Image on small graphics cards."""

if __package__:  # a plain import of this file, as test collection does it, is not ComfyUI loading the pack
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    WEB_DIRECTORY = "./js"

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
