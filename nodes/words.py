"""What the nodes are called on the page."""

CATEGORY = "Qwen-Image (low VRAM)"
LOADER = "Load Qwen-Image (low VRAM)"
ENCODE = "Encode Prompts (low VRAM)"
SAMPLE = "Sample (low VRAM)"
DECODE = "Decode (tiled)"
