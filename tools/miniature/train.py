"""Train the miniature from a seed and synthetic data alone, and write it as a pipeline folder.

    python tools/miniature/train.py --minutes 100 --out miniature

Uses a GPU if there is one. Checkpoints lie in --work; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else two training runs on one machine spin each other to a halt

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from miniature.flow import build_pool, train_transformer
from miniature.models import build_scheduler, build_transformer, use_single_frame
from miniature.text import train_text_encoder
from miniature.vae import sharpen_decoder, train_vae

ROOT = Path(__file__).resolve().parents[2]
VAE_PART, TEXT_PART, DECODER_PART = 0.2, 0.06, 0.11  # of the time; the transformer has the rest
COMPONENTS = ("transformer", "text_encoder", "vae", "tokenizer", "scheduler")


def export(out: Path, **components: object) -> None:
    """Write the folder in bf16, replacing an earlier one; a model card that lies there stays."""
    for name in COMPONENTS:
        shutil.rmtree(out / name, ignore_errors=True)
    use_single_frame(components["vae"], enabled=False)
    pipeline = QwenImagePipeline(scheduler=build_scheduler(), **components)
    pipeline.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)


def average_so_far(checkpoint: Path) -> QwenImageTransformer2DModel:
    """Return the transformer of a run that is still going on."""
    model = build_transformer()
    torch._foreach_copy_([p.data for p in model.parameters()], torch.load(checkpoint, weights_only=True)["average"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, required=True, help="of training, in all; drawing and encoding come on top"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="checkpoints; OUT.work if not given")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "miniature" / "tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--now", action="store_true", help="write the folder from the checkpoints as they are")
    arguments = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work = arguments.work or arguments.out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    seconds = 0 if arguments.now else 60 * arguments.minutes
    common = {"seed": arguments.seed, "device": device}

    vae = train_vae(work / "vae.pt", seconds=seconds * VAE_PART, **common)
    encoder = train_text_encoder(work / "text.pt", tokenizer, seconds=seconds * TEXT_PART, **common)
    if arguments.now:
        transformer = average_so_far(work / "transformer.pt")
    else:
        pool = build_pool(work / "pool.pt", vae, **common)
        left = seconds * (1 - VAE_PART - TEXT_PART - DECODER_PART)
        transformer = train_transformer(work / "transformer.pt", pool, encoder, tokenizer, seconds=left, **common)
    sharpen_decoder(vae, work / "decoder.pt", seconds=seconds * DECODER_PART, **common)
    fresh = AutoTokenizer.from_pretrained(arguments.tokenizer)  # the other one was told how to pad
    export(arguments.out, vae=vae, text_encoder=encoder, tokenizer=fresh, transformer=transformer)


if __name__ == "__main__":
    main()
