"""How many tokens, or bytes, layers compute at a time. Imports no torch: plans are made from these too."""

# MLP of the transformer, in the order in which plans try them; None: all tokens. Below 512 a GPU is no longer filled
MLP_CHUNKS = (None, 4096, 2048, 1024, 512)
# MLP of the text encoder
TEXT_MLP_TOKENS = 512
# norms of queries and keys in fp32, of transformers with heads' norms of their own
NORM_TOKENS = 1024
# more tokens than these are interrupted within a block: of 16x16 px each, references included, that is 2896x2896 px, of
# which a block of the model takes seconds
LONG_TOKENS = 32_768
# of such, queries of attention between two looks at whether to stop: of all heads, enough to keep a large card busy
QUERIES_BETWEEN_CHECKS = 2048
# what attention takes at a time where it makes scores: 1,500 queries of one head at 1328x1328 px
SCORES_AT_A_TIME_BYTES = 128 * 1024**2
