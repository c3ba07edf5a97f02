"""The trained miniature with the weights of its transformer in other formats, as users' files store them."""

from pathlib import Path

from bnb_folder import write_quantized_pipeline
from qwenimage_lowvram.engine.runs.opened_files import OpenedFiles
from split_files import write_split_files

MINIATURE = Path(__file__).parents[1] / "miniature"


def miniature_in(stored: str, scratch: Path) -> OpenedFiles:
    """The miniature with its transformer in that format (nf4, or a dtype of `write_split_files`), all else as it is."""
    if stored == "nf4":
        folder = scratch / "nf4"
        if not folder.exists():
            write_quantized_pipeline(MINIATURE, folder, load_in_4bit=True, bnb_4bit_quant_type="nf4")
        transformer = folder / "transformer"
    else:
        models = scratch / stored
        written = write_split_files(MINIATURE, models, dtype=stored, text_dtype="bf16", name="miniature")
        transformer = models / "diffusion_models" / written.transformer
    return OpenedFiles.of(transformer, *(MINIATURE / name for name in ("text_encoder", "vae", "tokenizer")))
