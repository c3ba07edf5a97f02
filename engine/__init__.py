"""The headless engine: files, formats, plans, streaming, networks, and whole images. Knows nothing of ComfyUI."""
