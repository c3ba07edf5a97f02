"""Qwen3-VL as text encoder: the language model layer by layer, and the vision part that it sees images with."""
