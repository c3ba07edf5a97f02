"""What Qwen's vision language models have in common as text encoders: prompts, images, streaming, tokenizers."""
