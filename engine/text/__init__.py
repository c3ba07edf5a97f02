"""Prompts to embeddings: templates, the text encoder layer by layer, and the cache of its results."""
