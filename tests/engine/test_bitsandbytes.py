"""Folders that bitsandbytes quantized load as they are, and compute what it computes."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import full_size
import pytest
import torch
from bnb_folder import dequantized, load_quantized
from diffusers import BitsAndBytesConfig, QwenImageTransformer2DModel
from full_size_run import require_planned_peaks
from qwenimage_lowvram.engine.errors import CheckpointError, DamagedFile, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from qwenimage_lowvram.engine.formats.bnb4 import with_quant_states
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.tensors import sort_transformer
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from safetensors.torch import load_file, save_file
from small_checkpoint import make_transformer
from torch._subclasses.fake_tensor import FakeTensorMode


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.float() - reference.float()).norm() / reference.float().norm())


# folders that diffusers and bitsandbytes wrote

CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "nf4 in the blocks": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["proj_out", "norm_out", "img_in", "txt_in", "time_text_embed"],
    },
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """`quantized(name of a configuration)` -> diffusers' model with bitsandbytes' layers, and its saved folder."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    root = tmp_path_factory.mktemp("bitsandbytes")
    make_transformer(layers=2, text_dim=64).save_pretrained(root / "plain")
    made: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in made:
            model = load_quantized(root / "plain", BitsAndBytesConfig(**CONFIGS[name]))
            model.save_pretrained(root / name)
            made[name] = model, root / name
        return made[name]

    return make


def a_branch() -> Branch:
    generator = torch.Generator().manual_seed(0)
    tokens, prompt = torch.randn(1, 30, 64, generator=generator), torch.randn(1, 9, 64, generator=generator)
    return Branch(tokens, ((1, 5, 6),), prompt, None, 0.7)


@torch.no_grad()
def forward(model: Any, branch: Branch) -> torch.Tensor:
    return model(
        hidden_states=branch.tokens,
        encoder_hidden_states=branch.prompt_embeds,
        timestep=torch.tensor([branch.timestep]),
        img_shapes=[list(branch.shapes)],
        return_dict=False,
    )[0]


def ours(folder: Path, hardware: Hardware) -> torch.Tensor:
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=torch.float32, hardware=hardware)
    transformer.load([1])
    with transformer.session(slots=1) as session:
        return session.forward([a_branch()])[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "int8"])
def test_a_four_bit_folder_computes_what_diffusers_and_bitsandbytes_do(
    name: str, quantized: Callable[[str], tuple[Any, Path]], hardware: Hardware
) -> None:
    model, folder = quantized(name)
    assert relative(ours(folder, hardware), forward(model, a_branch())) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantized_folder_computes_what_its_decoded_weights_do(
    name: str, quantized: Callable[[str], tuple[Any, Path]], cpu: Hardware
) -> None:
    # bitsandbytes' int8 layers also round what they multiply with; the weights alone are what a file holds
    model, folder = quantized(name)
    plain = QwenImageTransformer2DModel(**{k: v for k, v in model.config.items() if not k.startswith(("_", "quant"))})
    plain.load_state_dict(dequantized(model))
    difference = relative(ours(folder, cpu), forward(plain, a_branch()))
    assert difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["nf4", "nf4, double", "fp4", "int8"])
def test_a_single_file_of_bitsandbytes_computes_what_its_folder_does(
    name: str, prefix: str, quantized: Callable[[str], tuple[Any, Path]], cpu: Hardware, tmp_path: Path
) -> None:
    _, folder = quantized(name)
    (written,) = folder.glob("*.safetensors")
    file = tmp_path / "qwen-image-bnb.safetensors"
    save_file({prefix + key: tensor for key, tensor in load_file(written).items()}, file)
    assert torch.equal(ours(file, cpu), ours(folder, cpu))


def test_a_quantized_matrix_has_its_true_shape(quantized: Callable[[str], tuple[Any, Path]]) -> None:
    _, folder = quantized("nf4, double")
    tensors = with_quant_states(open_checkpoint(folder).tensors)
    weight = tensors["transformer_blocks.0.img_mlp.net.0.proj.weight"]
    assert (weight.dtype, weight.shape, weight.nbytes) == ("NF4", (256, 64), 256 * 64 // 2)
    assert sort_transformer(open_checkpoint(folder)).config.inner_dim == 64


# at the real size


def full_size_checkpoint(case: str, layers: int) -> Checkpoint:
    """The 20 B transformer with the blocks' matrices in nf4, nf4 doubly quantized, or int8."""
    checkpoint = full_size.transformer_checkpoint(torch.float8_e4m3fn, layers=layers)
    tensors = dict(checkpoint.tensors)
    for name, entry in checkpoint.tensors.items():
        if entry.dtype != "F8_E4M3":
            continue
        count = prod(entry.shape)

        def add(part: str, dtype: str, *shape: int, like: TensorEntry = entry) -> None:
            tensors[part] = replace(like, dtype=dtype, shape=shape, nbytes=prod(shape) * (1 if dtype == "U8" else 4))

        if case == "int8":
            tensors[name] = replace(entry, dtype="I8")
            add(name.removesuffix("weight") + "SCB", "F32", entry.shape[0])
            continue
        tensors[name] = replace(entry, dtype="NF4", nbytes=count // 2)
        add(f"{name}.absmax", "U8" if "double" in case else "F32", count // 64)
        if "double" in case:
            add(f"{name}.nested_absmax", "F32", count // 64 // 256)
            add(f"{name}.nested_quant_map", "F32", 256)
            add(f"{name}.nested_offset", "F32")
    return replace(checkpoint, tensors=tensors)


@pytest.mark.parametrize(
    ("case", "block_bytes", "all_bytes"),
    [("int8", 0.229e9, 13.8e9), ("nf4", 0.128e9, 7.8e9), ("nf4 double", 0.118e9, 7.2e9)],
)
def test_the_whole_transformer_takes_its_formats_size(case: str, block_bytes: float, all_bytes: float) -> None:
    with FakeTensorMode(), torch.inference_mode():
        footprint = QwenImageTransformer(
            full_size_checkpoint(case, 1),
            dtype=torch.bfloat16,
            hardware=full_size.fake_gpu(),
            source=full_size.EmptySource,
        ).footprint
    assert 0.9 * block_bytes < footprint.stored_bytes <= block_bytes
    assert 60 * footprint.stored_bytes + footprint.outside_bytes <= all_bytes


@pytest.mark.slow
@pytest.mark.parametrize("case", ["int8", "nf4", "nf4 double"])
def test_the_plan_of_a_full_size_transformer_is_what_its_run_takes(case: str) -> None:
    require_planned_peaks(full_size_checkpoint(case, 3), 1.5)


# damage

WEIGHT = "transformer_blocks.0.attn.to_q.weight"
NOTE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


def changed(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> Path:
    """A folder's only file with its tensors, and the note of one of them, changed by `change(tensors, note)`."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    note = json.loads(bytes(tensors[NOTE].tolist()))
    raw = change(tensors, note)
    raw = raw if isinstance(raw, bytes) else json.dumps(note).encode()
    tensors[NOTE] = torch.tensor(list(raw), dtype=torch.uint8)
    save_file(tensors, to / "m.safetensors")
    return to / "m.safetensors"


DAMAGES: dict[str, tuple[Callable[[Any, Any], Any], type[CheckpointError], str]] = {
    "no JSON": (lambda t, n: b"{", DamagedFile, "not valid JSON"),
    "no object": (lambda t, n: b"[1]", DamagedFile, "not an object"),
    "too long": (lambda t, n: b" " * 5000, DamagedFile, "5000 bytes"),
    "no shape": (lambda t, n: n.pop("shape"), DamagedFile, "has the shape None"),
    "a shape of texts": (lambda t, n: n.update(shape=["a", 2]), DamagedFile, "has the shape"),
    "an empty shape": (lambda t, n: n.update(shape=[0, 64]), DamagedFile, "has the shape"),
    "another shape": (lambda t, n: n.update(shape=[640, 64]), DamagedFile, "do not match"),
    "another block size": (lambda t, n: n.update(blocksize=128), WrongModel, r"blocks of \(128, 256\)"),
    "another type": (lambda t, n: n.update(quant_type="nf3"), WrongModel, "'nf3'"),
    "no offset": (lambda t, n: n.pop("nested_offset"), DamagedFile, "do not match"),
    "an offset that is no number": (lambda t, n: n.update(nested_offset=float("nan")), DamagedFile, "do not match"),
    "no scales": (lambda t, n: t.pop(f"{WEIGHT}.absmax"), DamagedFile, "do not match"),
    "no nested scales": (lambda t, n: t.pop(f"{WEIGHT}.nested_absmax"), DamagedFile, "do not match"),
    "too few codes": (lambda t, n: t.update({WEIGHT: t[WEIGHT][:-1]}), DamagedFile, "do not match"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_quant_state_that_does_not_fit_is_refused(
    damage: tuple[Callable[[Any, Any], Any], type[CheckpointError], str],
    quantized: Callable[[str], tuple[Any, Path]],
    tmp_path: Path,
) -> None:
    change, error, words = damage
    file = changed(quantized("nf4, double")[1], tmp_path, change)
    with pytest.raises(error, match=words):
        sort_transformer(open_checkpoint(file))
