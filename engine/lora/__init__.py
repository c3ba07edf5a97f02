"""LoRA files of every trainer, and what they add to a weight when it is decoded."""
