"""Teach the miniature to edit: from its own weights, synthetic edits and a seed, to an Edit-2509 pipeline folder.

    python tools/miniature/edit.py miniature --minutes 70 --out miniature-edit

Checkpoints lie in --work; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline
from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from miniature.edit_flow import build_pools, train_editing
from miniature.edit_text import Embeddings, build_edit_encoder, train_edit_encoder
from miniature.models import build_scheduler, use_single_frame

ROOT = Path(__file__).resolve().parents[2]
TEXT_PART = 0.05  # of the time; the transformer has the rest
COMPONENTS = ("transformer", "text_encoder", "vae", "tokenizer", "scheduler", "processor")


def export(out: Path, **components: object) -> None:
    """Write the folder in bf16, replacing an earlier one; a model card that lies there stays."""
    for name in COMPONENTS:
        shutil.rmtree(out / name, ignore_errors=True)
    use_single_frame(components["vae"], enabled=False)
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=components["tokenizer"],
        video_processor=Qwen2VLVideoProcessor(),
    )
    pipeline = QwenImageEditPlusPipeline(scheduler=build_scheduler(), processor=processor, **components)
    pipeline.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the miniature that draws")
    parser.add_argument("--minutes", type=float, required=True, help="of training, in all; encoding comes on top")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="checkpoints; OUT.work if not given")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "miniature-edit" / "tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--now", action="store_true", help="write the folder from the checkpoints as they are")
    arguments = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work = arguments.work or arguments.out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    seconds, seed = 60 * arguments.minutes, arguments.seed
    drawing = QwenImagePipeline.from_pretrained(arguments.folder)
    drawing.to(torch.float32)
    vae, transformer = drawing.vae, drawing.transformer.train()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)

    encoder = build_edit_encoder(drawing.text_encoder, drawing.tokenizer, tokenizer)
    encoder = train_edit_encoder(
        work / "text.pt", encoder, tokenizer, seconds=0 if arguments.now else seconds * TEXT_PART, seed=seed
    )
    if arguments.now:
        average = torch.load(work / "transformer.pt", weights_only=True)["average"]
        torch._foreach_copy_([p.data for p in transformer.parameters()], average)
    else:
        use_single_frame(vae, enabled=True)
        pools = build_pools(work / "pool.pt", vae, seed=seed)
        embed = Embeddings(encoder, tokenizer)
        left = seconds * (1 - TEXT_PART)
        train_editing(work / "transformer.pt", transformer, pools, embed, seconds=left, seed=seed)
    export(arguments.out, vae=vae, text_encoder=encoder, tokenizer=tokenizer, transformer=transformer)


if __name__ == "__main__":
    main()
