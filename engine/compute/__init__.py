"""How a block's layers compute: attention and token chunks. Knows no model."""
