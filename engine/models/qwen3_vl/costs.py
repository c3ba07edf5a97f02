"""What passes of Qwen3-VL take. Integers in; imports no torch."""

from collections.abc import Sequence

from ...compute.attention_kernels import AttentionShape
from ...planning.vision import VisionFootprint

# of a prompt, of its width, alive at once in transformers' Qwen3VLTextAttention
ATTENTION_STATES = 7


class Qwen3VisionFootprint(VisionFootprint):
    """Images pass through a block one after another; all of them are carried from block to block."""

    def activation_bytes(self, patches: Sequence[int]) -> int:
        """The factors count the tensors of a patch's width that are alive at once: where an image begins, in
        transformers' Qwen3VLVisionAttention, whose rotary embedding is computed in fp32, around its MLP, and where
        tokens are merged."""
        longest, element = max(patches), self.element_bytes
        unit = longest * self.hidden_size * element
        single = longest * self.hidden_size * 4
        carried = sum(patches) * (self.hidden_size * element + 2 * 4 * self.head_dim)  # sine and cosine in fp32
        begin = longest * self.patch_values * element + 5 * unit + 5 * single
        attention = 4 * unit + 4 * single + (2 * single if element < 4 else 0)
        heads = self.hidden_size // self.head_dim
        scores = self.attention.scratch_bytes(AttentionShape(longest, longest, heads, self.head_dim))
        mlp = 3 * unit + 2 * longest * self.intermediate_size * element
        return carried + max(begin, attention, 8 * unit + scores, mlp)

    @property
    def seen_bytes(self) -> int:
        """Embeddings, and three times as many of the deepstack, of a token, which is four patches."""
        return self.out_hidden_size * self.element_bytes
