"""Train, score and describe the miniature: a tiny Qwen-Image that draws the shapes its caption names."""
