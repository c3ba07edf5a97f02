"""Qwen-Image's transformer and its members: Qwen-Image, Edit, Edit-2509, Edit-2511 and Layered."""
