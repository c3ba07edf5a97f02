"""A Qwen3-VL text encoder's file, sorted, and whether it belongs to a transformer. Never touches weights."""

from ...files.checkpoint import Checkpoint
from ..qwen_vl.text_tensors import TextEncoderTensors, Usual, require_width, sort_language_model
from .component import TEXT_ENCODER

# of Qwen/Qwen3-VL-8B-Instruct, config.json
_USUAL = Usual("Qwen3-VL", "8B", head_dim=128, rope_theta=5_000_000.0, sections=(24, 20, 20))


def sort_text_encoder(checkpoint: Checkpoint) -> TextEncoderTensors:
    """config: of transformers' Qwen3VLTextConfig. Raises WrongModel where the file is no Qwen3-VL, or lacks tensors."""
    return sort_language_model(checkpoint, TEXT_ENCODER, _USUAL)


def require_fitting_encoder(transformer: Checkpoint, encoder: Checkpoint) -> None:
    """Raise WrongModel where the encoder makes embeddings of another size than the transformer takes, as Qwen3-VL in
    2B, 4B and 32B does."""
    require_width(transformer, "txt_in.text_norm.weight", encoder, TEXT_ENCODER, _USUAL)
