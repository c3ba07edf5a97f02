"""How a block's layers compute, and what that takes: attention and its kernels, token chunks. Knows no model."""
