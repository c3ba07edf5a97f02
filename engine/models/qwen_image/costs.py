"""What Qwen-Image's transformer takes: activations, operations, rows of its modulation table. Imports no torch."""

from dataclasses import dataclass

from ...compute.attention_kernels import AttentionShape
from ...planning.footprint import TransformerFootprint
from ...planning.request import PromptTokens, SamplingRequest

# of a token: 2x2 latent pixels
CHANNELS = 64
# tensors of one token's width that an exchange between processes holds beside q, k and v: as sent and as received
_EXCHANGED = 6
# of a branch in a block: q, k, v, and what is seen
_EXCHANGES = 4
# that the model was trained on (model card), and smaller ones
SUGGESTED_SIZES = ((1328, 1328), (1664, 928), (1024, 1024), (768, 768), (512, 512))
# of the prompt templates; an image to change has a megapixel for the transformer, and for the text encoder 384x384 px
# with its label
PROMPT_SIZES = PromptTokens(before=34, behind=5, before_edit=64, reference=64 * 64, seen=196 + 7)


@dataclass(frozen=True)
class QwenImageFootprint(TransformerFootprint):
    """head_dim, joint_attention_dim: as in diffusers' configuration. zero_cond_t: references are modulated as at
    timestep zero, token by token."""

    head_dim: int = 128
    joint_attention_dim: int = 3584
    zero_cond_t: bool = False

    @property
    def row_bytes(self) -> int:
        """One timestep's row of the modulation table: 6 vectors each for image, references where they have their own,
        and text, in every block."""
        return self.all_blocks * (18 if self.zero_cond_t else 12) * self.inner_dim * self.element_bytes

    @property
    def suggested_sizes(self) -> tuple[tuple[int, int], ...]:
        return SUGGESTED_SIZES

    def activation_bytes(self, request: SamplingRequest, chunk: int | None) -> int:
        """Of one process's part, where several make the image.

        The factors count the tensors of one token's width that are alive at once in diffusers'
        QwenImageTransformerBlock: in the joint attention (q, k, v, rotary embedding in fp32), and around the two MLPs,
        whose hidden width is four times the model's, before and after GELU; layers that compute on stored weights have
        less beside them. Where each token has its own gates
        (zero_cond_t), the first lives on through the MLPs.
        """
        unit = self.inner_dim * self.element_bytes
        image, text = _part(request.image_tokens, request) * unit, _part(request.prompt_tokens, request) * unit
        inputs = (request.image_tokens * CHANNELS + request.prompt_tokens * self.joint_attention_dim) * (
            self.element_bytes
        )
        carried = image + text + inputs
        scores = self.attention.scratch_bytes(self._attended(request))  # made when q and k have been turned
        if request.ranks > 1:
            scores += _EXCHANGED * (image + text)
        attention = max(10 * (image + text), 9 * (image + text) + scores)
        if self.in_half:  # q, k, v and what is seen as well, then the last layer's operand and result
            attention = max(10 * (image + text) + scores, 9 * (image + text) + 3 * image // 2)
        # all but the scores is still there when the last layer computes
        attention = max(attention, 10 * (image + text) + self.linear.scratch_bytes(image // unit, self.inner_dim))
        wide_image, wide_text = (
            max(8 * n, 5 * n + self.linear.scratch_bytes(n // unit))
            if chunk is None or n <= chunk * unit
            else n + max(8 * chunk * unit, 5 * chunk * unit + self.linear.scratch_bytes(chunk))
            for n in (image, text)
        )
        mlps = max(6 * image + 4 * text + wide_image, 7 * image + 6 * text + wide_text)
        gate = image if self.zero_cond_t else 0
        gathered = (2 * request.ranks + 1) * image if request.ranks > 1 and request.step_cache else 0
        widest = max(attention + gate, mlps + 2 * gate, gathered)
        return self.kept_bytes(request) + request.branches * carried + request.beside * inputs + widest

    def kept_bytes(self, request: SamplingRequest) -> int:
        """Rotary tables, as if each branch had its own, also one that another device computes."""
        tokens = _part(request.image_tokens, request) + _part(request.prompt_tokens, request)
        return (request.branches + request.beside) * tokens * (self.head_dim // 2) * 8  # complex64

    def attention_text(self, request: SamplingRequest) -> str:
        return self.attention.text(self._attended(request))

    def _attended(self, request: SamplingRequest) -> AttentionShape:
        """Of one branch: image and prompt see each other. Of several processes each has a part of the heads."""
        tokens = request.image_tokens + request.prompt_tokens
        return AttentionShape(tokens, tokens, self.inner_dim // self.head_dim // request.ranks, self.head_dim)

    def exchanged_bytes(self, request: SamplingRequest) -> int:
        """Ulysses' all-to-all (Jacobs et al., arXiv 2309.14509; diffusers' TemplatedUlyssesAnythingAttention): of its
        part of the tokens each of n processes gives away (n - 1)/n of the heads of q, k and v, and of what its own
        heads have seen the (n - 1)/n that are others' tokens: 4 (n - 1)/n^2 of a branch's tokens in each block."""
        part = _part(request.image_tokens, request) + _part(request.prompt_tokens, request)
        whole = _EXCHANGES * part * self.inner_dim * self.element_bytes
        return request.branches * whole * (request.ranks - 1) // request.ranks

    def exchanges(self, request: SamplingRequest) -> int:
        return _EXCHANGES * request.branches if request.ranks > 1 else 0

    def step_flops(self, request: SamplingRequest) -> float:
        """A block multiplies each token with 12 dim^2 weights (q, k, v and output projections, and an MLP four times
        as wide) of its own stream, and attends from every token to every token (dim products for the scores, dim for
        the sum); of several processes each does its part."""
        dim, tokens = self.inner_dim, request.image_tokens + request.prompt_tokens
        per_block = 2 * tokens * 12 * dim**2 + 4 * tokens**2 * dim
        return request.branches * self.all_blocks * per_block / request.ranks


def _part(tokens: int, request: SamplingRequest) -> int:
    """Of so many tokens the most that one process has."""
    return -(-tokens // request.ranks)
