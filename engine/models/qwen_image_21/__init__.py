"""Qwen-Image-2.1's transformer, and 2.1-Turbo's: one stream of prompt, references and image."""
