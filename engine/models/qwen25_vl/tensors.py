"""A Qwen2.5-VL text encoder's file, sorted, and whether it belongs to a transformer. Never touches weights."""

from ...files.checkpoint import Checkpoint
from ..qwen_vl.text_tensors import TextEncoderTensors, Usual, require_width, sort_language_model
from .component import TEXT_ENCODER

# of the 7B; no tensor's shape tells its heads
_USUAL = Usual("Qwen2.5-VL", "7B", head_dim=128, rope_theta=1_000_000.0, sections=(16, 24, 24))


def sort_text_encoder(checkpoint: Checkpoint) -> TextEncoderTensors:
    """config: of transformers' Qwen2_5_VLTextConfig. Raises WrongModel where the file is no Qwen2.5-VL, or lacks
    tensors."""
    return sort_language_model(checkpoint, TEXT_ENCODER, _USUAL)


def require_fitting_encoder(transformer: Checkpoint, encoder: Checkpoint) -> None:
    """Raise WrongModel where the encoder makes embeddings of another size than the transformer takes, as Qwen2.5-VL in
    3B and 72B does."""
    require_width(transformer, "txt_norm.weight", encoder, TEXT_ENCODER, _USUAL)
