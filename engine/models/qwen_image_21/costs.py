"""What Qwen-Image-2.1's transformer takes: activations and operations. Imports no torch."""

from dataclasses import dataclass

from ...compute.attention_kernels import AttentionShape
from ...compute.chunk_sizes import NORM_TOKENS
from ...planning.footprint import TransformerFootprint
from ...planning.request import PromptTokens, SamplingRequest

TOKEN_PX = 16  # that a token covers, of a request for this network
# (width, height) that the model was trained on (model card), and smaller ones to fall back to
SUGGESTED_SIZES = ((2048, 2048), (2752, 1536), (1536, 1536), (1024, 1024), (768, 768), (512, 512))
# of the prompt template; an image to change has a megapixel for transformer and text encoder, with its label
PROMPT_SIZES = PromptTokens(before=14, behind=8, before_edit=14, reference=64 * 64, seen=6, slots=32 * 32)
_CHANNELS = 64
_ROTARY_BYTES = 4  # of each of a head's dimensions: half as many complex numbers in fp32


def kept_bytes(tokens: int, inner_dim: int, element_bytes: int, *, in_half: bool) -> int:
    """Of a stretch's keys and values in one block; of those in fp16 with the factor of the values."""
    return 2 * tokens * inner_dim * (2 if in_half else element_bytes) + (4 if in_half else 0)


@dataclass(frozen=True)
class QwenImage21Footprint(TransformerFootprint):
    """head_dim, prompt_dim: as in diffusers' configuration (attention_head_dim, context_in_dim). mlp_dim: of the MLP
    between its matrices."""

    head_dim: int = 128
    prompt_dim: int = 4096
    mlp_dim: int = 12288

    @property
    def suggested_sizes(self) -> tuple[tuple[int, int], ...]:
        return SUGGESTED_SIZES

    def activation_bytes(self, request: SamplingRequest, chunk: int | None) -> int:
        """Carried are all images and prefixes, and the keys and values of the latter in the present block, which stay
        until all branches are through it; one of them at a time is at its widest."""
        image, references, text = request.frame_tokens, request.reference_tokens, request.prompt_tokens
        texts = request.distinct_prompts * text
        unit, rotary = self.inner_dim * self.element_bytes, self.head_dim * _ROTARY_BYTES
        carried = request.branches * image * (unit + rotary) + (references + texts) * (
            unit + 2 * self._attended_unit + rotary
        )
        # references as they came, and one after another
        carried += (request.branches * image + 2 * references) * _CHANNELS * self.element_bytes
        carried += texts * (self.prompt_dim * self.element_bytes + references + text)  # and what each token sees
        widest = [self._image_bytes(image, references + text, chunk), self._prefix_bytes(text, references, chunk)]
        return carried + max(*widest, self._prefix_bytes(references, 0, chunk), self._text_bytes(text))

    def attention_text(self, request: SamplingRequest) -> str:
        image, before = request.frame_tokens, request.reference_tokens + request.prompt_tokens
        return self.attention.text(self._attended(image, before))

    def step_flops(self, request: SamplingRequest) -> float:
        """Of the images alone: each token by 4 dim^2 weights of attention and 3 dim mlp_dim of the MLP, and attention
        from every token of an image to all before it and itself."""
        before = request.reference_tokens + request.prompt_tokens
        return request.branches * self._flops(request.frame_tokens, before + request.frame_tokens)

    def kept_block_bytes(self, request: SamplingRequest) -> int:
        """Keys and values of all prompts and references."""
        prefix = [request.reference_tokens, *[request.prompt_tokens] * request.distinct_prompts]
        sizes = self.inner_dim, self.element_bytes
        return sum(kept_bytes(tokens, *sizes, in_half=self.in_half) for tokens in prefix if tokens)

    def kept_flops(self, request: SamplingRequest) -> float:
        """Of all prompts and references, once."""
        references = request.reference_tokens
        return self._flops(references, references) + self.kept_again_flops(request)

    def kept_again_flops(self, request: SamplingRequest) -> float:
        """Of all prompts, once: the references stand before them."""
        text = request.prompt_tokens
        return request.distinct_prompts * self._flops(text, request.reference_tokens + text)

    def _flops(self, tokens: int, keys: int) -> float:
        dim = self.inner_dim
        return float(self.all_blocks * 2 * tokens * (4 * dim**2 + 3 * dim * self.mlp_dim + 2 * keys * dim))

    @property
    def _attended_unit(self) -> int:
        """Of a token's queries, keys or values, which are in fp16 where products are."""
        return self.inner_dim * (2 if self.in_half else self.element_bytes)

    def _image_bytes(self, tokens: int, before: int, chunk: int | None) -> int:
        """Of an image in a block, beyond what is carried. Before attention: what is scaled, queries and keys; then
        queries, keys and values with those before them, and what is seen."""
        unit = self._attended_unit
        attending = tokens * unit + 2 * (tokens + before) * unit + self._seen_bytes(tokens, before)
        # compiled code does nothing in place, and the first of its results is compared
        copies = 3 * tokens * unit if self.compiled else 0
        projecting = self._projecting_bytes(tokens, 4)
        return copies + max(self._turning_bytes(tokens), attending, projecting, self._mlp_bytes(tokens, chunk))

    def _prefix_bytes(self, tokens: int, before: int, chunk: int | None) -> int:
        """The same of a stretch of a prefix, whose own keys and values are carried; what its pieces see is joined."""
        unit = self._attended_unit
        carried = 2 if self.in_half else 1
        joined = 2 * (tokens + before) * unit if before else 0
        attending = tokens * unit + joined + self._seen_bytes(tokens, before, pieces=1 if before else 2)
        turning = self._turning_bytes(tokens) - carried * tokens * unit
        projecting = self._projecting_bytes(tokens, 3)
        return max(turning, attending, projecting, self._mlp_bytes(tokens, chunk))

    def _turning_bytes(self, tokens: int) -> int:
        """What is scaled, queries and keys, some of them in fp32; where products are in fp16, then values in both."""
        unit = self.inner_dim * self.element_bytes
        if self.in_half:
            return max(7 * tokens * unit // 2, 5 * tokens * unit // 2 + self._norm_bytes(tokens))
        return 3 * tokens * unit + self._norm_bytes(tokens)

    def _projecting_bytes(self, tokens: int, units: int) -> int:
        """Of layers that compute on their stored weights, beside so many numbers of each token's width; less than what
        follows where none does."""
        scratch = self.linear.scratch_bytes(tokens)
        return units * tokens * self.inner_dim * self.element_bytes + scratch if scratch else 0

    def _seen_bytes(self, tokens: int, before: int, pieces: int = 1) -> int:
        """What is seen, in so many pieces that are joined, or what attention makes beside that; then in fp32."""
        unit, scratch = self._attended_unit, self.attention.scratch_bytes(self._attended(tokens, before))
        return max(pieces * tokens * unit, scratch, 3 * tokens * unit if self.in_half else 0)

    def _norm_bytes(self, tokens: int) -> int:
        return min(tokens, NORM_TOKENS) * self.inner_dim * (2 * 4 + self.element_bytes)

    def _mlp_bytes(self, tokens: int, chunk: int | None) -> int:
        """Behind attention, and scaled; the result is as wide as the two products until one of them is gone, before
        which a layer that computes on its stored weight takes what it needs."""
        unit, wide = self.inner_dim * self.element_bytes, 2 * self.mlp_dim * self.element_bytes
        if self.in_half:  # the last layer's operand and result
            wide += (self.mlp_dim + self.inner_dim) * self.element_bytes // 2
        together = tokens if chunk is None else min(tokens, chunk)
        widest = together * wide + self.linear.scratch_bytes(together)
        return (2 if together == tokens else 3) * tokens * unit + widest

    def _text_bytes(self, text: int) -> int:
        """Of a prompt's way into the first block: its norm in fp32, three times, before there are its tokens, keys and
        values, which are carried."""
        wide = self.prompt_dim * (3 * 4 + 2 * self.element_bytes)
        return text * max(0, wide - self.inner_dim * self.element_bytes - 2 * self._attended_unit)

    def _attended(self, tokens: int, before: int) -> AttentionShape:
        return AttentionShape(tokens, tokens + before, self.inner_dim // self.head_dim, self.head_dim)
