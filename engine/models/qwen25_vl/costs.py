"""What a pass of Qwen2.5-VL's vision tower takes. Integers in; imports no torch."""

from collections.abc import Sequence

from ...compute.attention_kernels import AttentionShape
from ...planning.vision import VisionFootprint


class Qwen25VisionFootprint(VisionFootprint):
    """All images pass through a block together."""

    def activation_bytes(self, patches: Sequence[int]) -> int:
        """The factors count the tensors of a patch's width that are alive at once in transformers'
        Qwen2_5_VLVisionAttention, where the rotary embedding is computed in fp32, and around its MLP."""
        total, element = sum(patches), self.element_bytes
        unit = total * self.hidden_size * element
        single = total * self.hidden_size * 4
        indices = 24 * total  # which window a patch belongs to, and its row and column
        # sine and cosine in fp32, and the angles, which transformers 4 keeps for as long
        rotary = 4 * self.head_dim * 7 // 2
        carried = total * (self.patch_values * element + rotary) + unit + indices
        attention = 4 * unit + 4 * single + (2 * single if element < 4 else 0)
        heads, longest = self.hidden_size // self.head_dim, max(patches)
        scores = self.attention.scratch_bytes(AttentionShape(longest, longest, heads, self.head_dim))
        mlp = 2 * unit + 3 * total * self.intermediate_size * element
        return carried + max(attention, 8 * unit + scores, mlp)

    @property
    def seen_bytes(self) -> int:
        return self.out_hidden_size * self.element_bytes
