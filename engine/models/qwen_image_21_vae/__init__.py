"""Qwen-Image-2.1's VAE for still images: 64 channels, a sixteenth of the size, RGBA."""
