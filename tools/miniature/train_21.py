"""Train the miniature of Qwen-Image-2.1 from a seed and synthetic data alone, and write it as a pipeline folder.

    python tools/miniature/train_21.py --minutes 200 --out miniature-2.1

Needs diffusers 0.42 or later, and ComfyUI's files of the tokenizer (COMFYUI_PATH). Checkpoints lie in --work; the same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from diffusers import QwenImage21Transformer2DModel
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from devtools.comfyui import require_comfyui
from small_checkpoint import TOKENIZER_IN_COMFYUI
from small_pipeline_21 import INDEX, SCHEDULER

from miniature.flow_21 import build_pool, build_transformer, train_transformer
from miniature.text_21 import Embeddings, train_text_encoder
from miniature.tokenizer_21 import write_tokenizer
from miniature.vae_21 import train_vae

VAE_PART, TEXT_PART = 0.25, 0.08  # of the time; the transformer has the rest
COMPONENTS = ("transformer", "text_encoder", "vae", "processor", "scheduler")


def export(out: Path, tokenizer: Path, **components: torch.nn.Module) -> None:
    """Write the folder in bf16, replacing an earlier one; a model card that lies there stays."""
    for name in COMPONENTS:
        shutil.rmtree(out / name, ignore_errors=True)
    for name, component in components.items():
        component.to(torch.bfloat16).save_pretrained(out / name, safe_serialization=True)
    shutil.copytree(tokenizer, out / "processor")
    (out / "scheduler").mkdir()
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n", encoding="utf-8")
    (out / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n", encoding="utf-8")


def average_so_far(checkpoint: Path) -> QwenImage21Transformer2DModel:
    """Return the transformer of a run that is still going on."""
    model = build_transformer()
    torch._foreach_copy_([p.data for p in model.parameters()], torch.load(checkpoint, weights_only=True)["average"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="of training; drawing and encoding come on top")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="checkpoints; OUT.work if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=6000, help="images, and edits, that are trained on")
    parser.add_argument("--now", action="store_true", help="write the folder from the checkpoints as they are")
    arguments = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work = arguments.work or arguments.out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer").exists():
        write_tokenizer(require_comfyui() / TOKENIZER_IN_COMFYUI, work / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    seconds, seed = 0 if arguments.now else 60 * arguments.minutes, arguments.seed

    vae = train_vae(work / "vae.pt", seconds=seconds * VAE_PART, seed=seed)
    encoder = train_text_encoder(work / "text.pt", tokenizer, seconds=seconds * TEXT_PART, seed=seed)
    if arguments.now:
        transformer = average_so_far(work / "transformer.pt")
    else:
        pool = build_pool(work / "pool.pt", vae, seed=seed, size=arguments.pool)
        left = seconds * (1 - VAE_PART - TEXT_PART)
        embed = Embeddings(encoder, tokenizer)
        transformer = train_transformer(work / "transformer.pt", pool, embed, seconds=left, seed=seed)
    export(arguments.out, work / "tokenizer", vae=vae, text_encoder=encoder, transformer=transformer)


if __name__ == "__main__":
    main()
