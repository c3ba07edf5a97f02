"""Write models as GGUF files, with the gguf package's own writer and quantizer, as the common converters do."""

import json
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

# of a type that the gguf package cannot write, the place of its blocks' fp16 scale
_SCALE_AT = dict.fromkeys(("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "Q4_K", "Q5_K"), 0)
# of types whose blocks have a fp16 scale of offsets behind the other: how many times as large it is, so that the mean
# of random codes is near zero
_OFFSET = {"Q4_K": 7.5, "Q5_K": 15.5}
SCALED_BLOCKS = 4096  # that tell how large the numbers of random blocks are
# transformers' name in a layer -> llama.cpp's
_TEXT_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TEXT_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf_transformer(
    file: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], *kinds: str, **split: Any
) -> None:
    """`split`: the writer's own arguments for a file in parts, such as split_max_tensors=9.

    Architecture qwen_image, the transformer's own names: blocks' matrices of types `kinds` ("Q8_0", ...) by turns,
    vectors and norms F32, matrices outside the blocks BF16 and F16 by turns. The configuration is the setting "config".
    """
    writer = GGUFWriter(file, "qwen_image", **split)
    writer.add_string("config", json.dumps(config))
    inside, outside = cycle(kinds), cycle(("BF16", "F16"))
    for name, value in weights.items():
        of_matrices = inside if name.startswith("transformer_blocks.") else outside
        add_tensor(writer, name, value, next(of_matrices) if value.ndim > 1 else "F32")
    write_writer(writer)


def write_gguf_text_encoder(
    file: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], kind: str, **split: Any
) -> None:
    """Architecture qwen2vl, llama.cpp's names and settings, without the vision tower (whose file is the mmproj)."""
    text = config["text_config"]
    writer = GGUFWriter(file, "qwen2vl", **split)
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    rope = text.get("rope_parameters") or {**text["rope_scaling"], "rope_theta": text["rope_theta"]}  # transformers 4
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_token_list([f"token {i}" for i in range(100)])  # a list that readers of weights step over
    for name, value in weights.items():
        if (new := llama_name(name)) is not None:
            add_tensor(writer, new, value, kind if value.ndim == 2 else "F32")
    write_writer(writer)


def write_gguf_vision(
    file: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], kind: str, projector: str = "qwen2.5vl_merger"
) -> None:
    """The mmproj of a text encoder: architecture clip, the tensors of `weights` that begin with "visual.".

    As llama.cpp's converter has it (Qwen2VLVisionModel): queries, keys and values apart, the 3D kernel as two 2D ones
    in F16 (F32 where `kind` is F32), matrices of type `kind`, vectors F32. Names are the gguf package's.
    """
    vision = config["vision_config"]
    writer = GGUFWriter(file, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", projector)
    writer.add_uint32("clip.vision.block_count", vision["depth"])
    writer.add_uint32("clip.vision.embedding_length", vision["hidden_size"])
    writer.add_uint32("clip.vision.feed_forward_length", vision["intermediate_size"])
    writer.add_uint32("clip.vision.attention.head_count", vision["num_heads"])
    writer.add_uint32("clip.vision.patch_size", vision["patch_size"])
    writer.add_uint32("clip.vision.n_wa_pattern", vision["fullatt_block_indexes"][0] + 1)
    # its table numbers the layers of the projector (mm.0, mm.2) as it does blocks
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(3, vision["depth"]))
    for name, value in weights.items():
        if not name.startswith("visual."):
            continue
        kind_here = kind if value.ndim == 2 else "F32"
        if value.ndim == 5:
            pieces = {f"v.patch_embd.weight{'.1' * i}": value[:, :, i] for i in range(value.shape[2])}
            kind_here = "F32" if kind == "F32" else "F16"
        elif ".qkv." in name:
            pieces = {name.replace("qkv", letter): rows for letter, rows in zip("qkv", value.chunk(3), strict=True)}
        else:
            pieces = {name: value}
        for piece_name, piece in pieces.items():
            own = names.get_name(piece_name, try_suffixes=(".weight", ".bias"))
            add_tensor(writer, own or piece_name, piece, kind_here)
    write_writer(writer)


def llama_name(name: str) -> str | None:
    """llama.cpp's name of a language model's tensor, None for the vision tower's."""
    if not name.startswith("model.layers."):
        return _TEXT_OUTSIDE.get(name)
    index, _, rest = name.removeprefix("model.layers.").partition(".")
    part, _, kind = rest.rpartition(".")
    return f"blk.{index}.{_TEXT_LAYER[part]}.{kind}"


def read_gguf(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file as the gguf package decodes it, in fp32, under the names of the file."""
    weights = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        weights[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32)).view(shape)
    return weights


def add_tensor(writer: GGUFWriter, name: str, value: Tensor, kind: str) -> None:
    type_ = GGMLQuantizationType[kind]
    weight = value.float().contiguous().numpy()
    raw = random_blocks(weight, kind) if kind in _SCALE_AT else gguf.quants.quantize(weight, type_)
    writer.add_tensor(name, raw, raw_dtype=type_)


def random_blocks(weight: "np.ndarray[Any, Any]", kind: str) -> "np.ndarray[Any, Any]":
    """Blocks of a type that the gguf package decodes only: any codes, and a scale that gives numbers as large as
    those of the weight."""
    type_, at = GGMLQuantizationType[kind], _SCALE_AT[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[type_]
    shape = (*weight.shape[:-1], weight.shape[-1] // block * nbytes)
    raw = np.random.default_rng(weight.size).integers(0, 256, shape, dtype=np.uint8).reshape(-1, nbytes)
    _set_scale(raw, at, kind, 1.0)
    _set_scale(raw, at, kind, float(weight.std() / gguf.quants.dequantize(raw[:SCALED_BLOCKS], type_).std()))
    return raw.reshape(shape)


def _set_scale(raw: "np.ndarray[Any, Any]", at: int, kind: str, scale: float) -> None:
    raw[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), dtype=np.uint8)
    if kind in _OFFSET:
        raw[:, at + 2 : at + 4] = np.frombuffer(np.float16(_OFFSET[kind] * scale).tobytes(), dtype=np.uint8)


def write_writer(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
