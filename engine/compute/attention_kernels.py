"""Which kernels compute attention, in which chunks, and what they take. Values; imports no torch.

A kernel to come is one more value here, and its function in `attention_packages.py`.
"""

from dataclasses import dataclass

from .chunk_sizes import SCORES_AT_A_TIME_BYTES

# of one score in torch's attention without a fused kernel: itself and its softmax in fp32, and whether it is -inf; half
# of that where the process lets torch make scores in half precision, as ComfyUI does
_SCORE_BYTES = 4 + 4 + 1
# of one score's mask, made for all heads: in fp32 and as truth
_MASK_BYTES = 4 + 1
# what torch copies to fp32 of each token and head: queries, scaled and not; keys, the same, and values
_QUERY_COPIES, _KEY_COPIES = 2 * 4, 3 * 4


@dataclass(frozen=True)
class AttentionShape:
    """heads: of the queries; `shared` of them look at the same keys. masked: with a mask of its own for each query,
    such as that of causal attention."""

    queries: int
    keys: int
    heads: int
    head_dim: int
    shared: int = 1
    masked: bool = False


@dataclass(frozen=True)
class AttentionChunk:
    """What is computed at a time, at most: so many queries of so many heads."""

    heads: int
    queries: int

    def __str__(self) -> str:
        return f"{self.queries} queries of {self.heads} head{'s' if self.heads != 1 else ''}"


@dataclass(frozen=True)
class AttentionKernel:
    """scores_bytes: what one chunk may take, of scores and copies; None: the kernel makes no scores, and takes all at
    once. exact: it computes with queries, keys and values as they are; others quantize them. copy_bytes: of each
    number of these, in copies that it makes. otherwise: what computes what this one cannot, such as a mask."""

    name: str
    scores_bytes: int | None = None
    exact: bool = True
    copy_bytes: int = 0
    otherwise: "AttentionKernel | None" = None

    def chunk(self, shape: AttentionShape) -> AttentionChunk:
        """As many whole heads as fit, as even as can be; where not one does, as many queries of it, at least one."""
        if self.scores_bytes is None:
            return AttentionChunk(shape.heads, shape.queries)
        shared = _mask_bytes(shape, shape.queries)
        heads = (self.scores_bytes - shared) // _head_bytes(shape, shape.queries)
        if heads >= shape.heads:
            return AttentionChunk(shape.heads, shape.queries)
        if heads >= shape.shared:  # heads with the same keys stay together
            return AttentionChunk(
                shape.shared * _evenly(shape.heads // shape.shared, heads // shape.shared), shape.queries
            )
        if heads >= 1:
            return AttentionChunk(1, shape.queries)
        none = _head_bytes(shape, 0)
        each = _head_bytes(shape, 1) - none + _mask_bytes(shape, 1)
        return AttentionChunk(1, _evenly(shape.queries, max(1, (self.scores_bytes - none) // each)))

    def scratch_bytes(self, shape: AttentionShape) -> int:
        """Held beside queries, keys, values and the result, by itself or by what computes otherwise."""
        beside = self.otherwise.scratch_bytes(shape) if self.otherwise else 0
        numbers = (shape.queries + 2 * shape.keys // shape.shared) * shape.heads * shape.head_dim
        own = self.copy_bytes * numbers
        if self.scores_bytes is not None:
            chunk = self.chunk(shape)
            own += chunk.heads * _head_bytes(shape, chunk.queries) + _mask_bytes(shape, chunk.queries)
        return max(own, beside)

    def text(self, shape: AttentionShape) -> str:
        """As plans and reports show it."""
        whole = self.chunk(shape) == AttentionChunk(shape.heads, shape.queries)
        name = self.name if self.exact else f"{self.name} (not exact)"
        return name if whole else f"{name} in chunks of {self.chunk(shape)}"


def _evenly(count: int, most: int) -> int:
    """The largest of the fewest parts of at most `most`, as `token_chunks.chunk_bounds` makes them."""
    return -(-count // -(-count // most))


def _head_bytes(shape: AttentionShape, queries: int) -> int:
    copies = queries * _QUERY_COPIES + shape.keys * _KEY_COPIES
    return queries * shape.keys * _SCORE_BYTES + copies * shape.head_dim


def _mask_bytes(shape: AttentionShape, queries: int) -> int:
    return queries * shape.keys * _MASK_BYTES if shape.masked else 0


# torch's scaled_dot_product_attention, where it has a fused kernel: flash, memory-efficient, cuDNN's or oneDNN's
FUSED = AttentionKernel("pytorch")
# the same where it has none
SCORES = AttentionKernel("pytorch", SCORES_AT_A_TIME_BYTES)
# the same with one of its fused kernels, or none, whatever it would choose
PYTORCH_FLASH = AttentionKernel("pytorch flash")
PYTORCH_EFFICIENT = AttentionKernel("pytorch efficient")
SPLIT = AttentionKernel("split", SCORES_AT_A_TIME_BYTES)
# of other packages
FLASH = AttentionKernel("flash")
XFORMERS = AttentionKernel("xformers")
# copies in 8 bits, and one in 16 bits of what is smoothed or rotated before
SAGE = AttentionKernel("sage", exact=False, copy_bytes=3)
KITCHEN_INT8 = AttentionKernel("comfy_kitchen_int8", exact=False, copy_bytes=3)
