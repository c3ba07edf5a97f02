"""Distil the miniature into four steps without guidance, as a LoRA in Lightning's key names.

    python tools/miniature/distill.py miniature --minutes 15 --out miniature/lightning-4steps.safetensors

The teacher samples with guidance in small steps that pass through the four-step schedule's sigmas; the LoRA learns the
mean velocity between them. Needs diffusers and peft; uses a GPU if there is one.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import time
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.transformers import transformer_qwenimage
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from miniature.data import LANGUAGES, caption, draw_scene
from miniature.flow import GRID, attend
from miniature.text import embed, tokenize

log = logging.getLogger("distill")

# Qwen-Image-Lightning's schedule of four steps: shift 3
SIGMAS = [3 * t / (1 + 2 * t) for t in (1.0, 0.75, 0.5, 0.25)] + [0.0]
TEACHER_STEPS = 5  # between two of them
GUIDANCE, NEGATIVE = 4.0, " "
RANK, BATCH = 16, 50
LR = 1e-3
TEACHER_PART = 0.45  # of the time: images to learn from; the rest is training
TARGETS = r".*(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|net\.0\.proj|net\.2)"


def velocity(model: QwenImageTransformer2DModel, x: Tensor, sigma: Tensor, prompt: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        out = model(
            hidden_states=x,
            timestep=sigma,
            encoder_hidden_states=prompt[0],
            encoder_hidden_states_mask=prompt[1],
            img_shapes=[[(1, GRID, GRID)]] * len(x),
            return_dict=False,
        )[0]
    return out.float()


@torch.no_grad()
def trajectory(
    model: QwenImageTransformer2DModel, positive: tuple[Tensor, Tensor], negative: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Guided latents at SIGMAS, (B, tokens, 64) each, from fresh noise."""
    count, device = len(positive[0]), positive[0].device
    x = torch.randn(count, GRID * GRID, 64, device=device)
    points = [x]
    for now, then in pairwise(SIGMAS):
        for step in range(TEACHER_STEPS):
            sigma = now + (then - now) * step / TEACHER_STEPS
            at = torch.full((count,), sigma, device=device)
            cond, uncond = velocity(model, x, at, positive), velocity(model, x, at, negative)
            guided = uncond + GUIDANCE * (cond - uncond)
            guided *= cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
            x = x + (then - now) / TEACHER_STEPS * guided
        points.append(x)
    return points


def export(model: QwenImageTransformer2DModel, path: Path) -> None:
    tensors = {}
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            part = "down" if ".lora_A." in name else "up"
            layer = name.split(".lora_")[0]
            tensors[f"{layer}.lora_{part}.weight"] = weight.detach().bfloat16().contiguous().cpu()
            tensors[f"{layer}.alpha"] = torch.tensor(float(RANK))  # without it diffusers ignores these names
    save_file(tensors, path, {"made_by": "tools/miniature/distill.py"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(arguments.seed)
    rng = random.Random(f"distill {arguments.seed}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = QwenImagePipeline.from_pretrained(arguments.folder).to(device)
    model, encoder, tokenizer = pipeline.transformer, pipeline.text_encoder, pipeline.tokenizer
    transformer_qwenimage.dispatch_attention_fn = attend
    seconds, start = 60 * arguments.minutes, time.monotonic()

    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        return embed(encoder, tokenize(tokenizer, texts, device))

    lessons = []
    while time.monotonic() - start < TEACHER_PART * seconds:
        scenes = [draw_scene(rng, held_out=False) for _ in range(BATCH)]
        positive = encode([caption(scene, rng.choice(LANGUAGES), rng) for scene in scenes])
        lessons.append((positive, trajectory(model, positive, encode([NEGATIVE] * BATCH))))
        log.info("%d images of the teacher", BATCH * len(lessons))

    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, LR, (0.9, 0.98), weight_decay=0.0)
    step, mean = 0, 0.0
    while (used := time.monotonic() - start) < seconds:
        part = (used / seconds - TEACHER_PART) / (1 - TEACHER_PART)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 50) * max(0.02, 1 - part)
        prompt, points = rng.choice(lessons)
        i = rng.randrange(len(SIGMAS) - 1)
        target = (points[i + 1] - points[i]) / (SIGMAS[i + 1] - SIGMAS[i])
        at = torch.full((BATCH,), SIGMAS[i], device=device)
        loss = (velocity(model, points[i], at, prompt) - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step, mean = step + 1, 0.98 * mean + 0.02 * loss.item() if step else loss.item()
        if step % 100 == 0:
            log.info("step %d loss %.4f", step, mean)
    export(model, arguments.out)


if __name__ == "__main__":
    main()
