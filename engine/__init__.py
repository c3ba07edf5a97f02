"""The headless engine: checkpoints, formats, plan, streaming, stages. Knows nothing of ComfyUI."""
