"""ComfyUI's own switches: which of them the pack follows, and what the followed ones ask for. Changes none."""

import argparse
from dataclasses import dataclass
from enum import Enum

import comfy.model_management
import torch
from comfy.cli_args import args, parser

from ...engine.compute.attention_choice import AUTO
from ...engine.compute.attention_kernels import FLASH, KITCHEN_INT8, SAGE, SPLIT, XFORMERS
from ...engine.environment import variable
from ...engine.log import logger
from ...engine.packages import ATTENTION, ATTENTION_VARIABLE

GIB = 1024**3
_ALL = 1 << 60  # bytes


class Follow(Enum):
    """What the pack does about a switch."""

    HONOURED = "honoured"
    NAMED = "not followed yet: the log says so"
    IRRELEVANT = "irrelevant"


@dataclass(frozen=True)
class Switch:
    follow: Follow
    reason: str


def _table(follow: Follow, reason: str, *names: str) -> dict[str, Switch]:
    return dict.fromkeys(names, Switch(follow, reason))


_SERVER = "about the server, its pages and its files"
_NODES = "about which nodes are loaded"
_OWN_STREAMING = "about how ComfyUI moves weights; ours are moved by the pack's own plan"
_DEVICES = "taken from ComfyUI's choice of devices"
_ATTENTION = "auto of attention in the loader"
_PRECISION = "attention is computed in the dtype that the loader says"
_COMPUTE = "dtype is chosen in the loader"
_COMPILER = "about ComfyUI's compiler of models, which ours does not pass through"
_READING = "files are read piece by piece, never mapped"
_CACHES = "about the outputs of nodes; our reserve of RAM stays clear of ComfyUI's default"

# by the name of the parser's attribute, of every ComfyUI up to 0.38
SWITCHES: dict[str, Switch] = {
    **_table(Follow.HONOURED, "kept free on the card", "reserve_vram", "vram_headroom"),
    **_table(Follow.HONOURED, "no host memory is page-locked", "disable_pinned_memory"),
    **_table(Follow.HONOURED, "our share of RAM stays clear of the first threshold", "cache_ram"),
    **_table(Follow.HONOURED, "encoder, VAE and intermediate results are on the card", "gpu_only"),
    **_table(Follow.HONOURED, "auto of vae_device is the CPU", "cpu_vae"),
    **_table(Follow.HONOURED, "auto of dtype for the VAE", "fp16_vae", "bf16_vae", "fp32_vae"),
    **_table(Follow.HONOURED, "auto of dtype is fp32", "force_fp32"),
    **_table(Follow.HONOURED, "ComfyUI unloads our models as it does its own", "disable_smart_memory"),
    **_table(Follow.HONOURED, "the encoder streams, so it stays on the transformer's device", "novram"),
    **_table(Follow.HONOURED, "what nodes hand on is of that dtype", "fp16_intermediates"),
    **_table(Follow.HONOURED, "set on torch before anything runs", "deterministic"),
    **_table(
        Follow.HONOURED,
        _DEVICES,
        "cpu",
        "directml",
        "cuda_device",
        "default_device",
        "oneapi_device_selector",
        "lowvram",
    ),
    **_table(Follow.HONOURED, "the cache's folder is in the models folder", "models_directory", "base_directory"),
    **_table(Follow.HONOURED, "the key qwen_lowvram sets the cache's folder", "extra_model_paths_config"),
    **_table(
        Follow.HONOURED,
        "products are computed by the backends of comfy-kitchen's that ComfyUI leaves on",
        "enable_triton_backend",
        "disable_triton_backend",
    ),
    **_table(
        Follow.HONOURED,
        _ATTENTION,
        "use_split_cross_attention",
        "use_quad_cross_attention",
        "use_sage_attention",
        "use_flash_attention",
        "use_ck_attention",
        "use_pytorch_cross_attention",
        "disable_xformers",
    ),
    **_table(Follow.NAMED, _PRECISION, "force_upcast_attention", "dont_upcast_attention"),
    **_table(
        Follow.NAMED,
        _COMPUTE,
        "force_fp16",
        "fp32_unet",
        "fp64_unet",
        "bf16_unet",
        "fp16_unet",
        "fp8_e4m3fn_unet",
        "fp8_e5m2_unet",
        "fp8_e8m0fnu_unet",
        "fp8_e4m3fn_text_enc",
        "fp8_e5m2_text_enc",
        "fp16_text_enc",
        "fp32_text_enc",
        "bf16_text_enc",
    ),
    **_table(Follow.NAMED, "weights are decoded and computed on as the loader says", "fast", "supports_fp8_compute"),
    **_table(Follow.NAMED, "copies run on a stream of their own where the device has them", "disable_async_offload"),
    **_table(Follow.IRRELEVANT, "blocks stay on the card wherever they fit", "highvram"),
    **_table(
        Follow.IRRELEVANT,
        _OWN_STREAMING,
        "async_offload",
        "disable_dynamic_vram",
        "enable_dynamic_vram",
        "disable_nvml_pressure",
        "fast_disk",
        "disable_fast_disk",
        "force_non_blocking",
    ),
    **_table(Follow.IRRELEVANT, _CACHES, "cache_classic", "cache_lru", "cache_none", "high_ram"),
    **_table(Follow.IRRELEVANT, _READING, "mmap_torch_files", "disable_mmap"),
    **_table(Follow.IRRELEVANT, "the transformer has no convolutions; the VAE is channels-last", "force_channels_last"),
    **_table(Follow.IRRELEVANT, "of torch, before anything is allocated", "cuda_malloc", "disable_cuda_malloc"),
    **_table(Follow.IRRELEVANT, _COMPILER, "disable_cuda_graphs", "disable_comfy_compiler", "assert_graph_breaks"),
    **_table(
        Follow.IRRELEVANT,
        _NODES,
        "disable_all_custom_nodes",
        "whitelist_custom_nodes",
        "disabled_nodes_config",
        "disable_partner_nodes",
        "disable_api_nodes",
        "offline",
        "enable_manager",
        "disable_manager_ui",
        "enable_manager_legacy_ui",
    ),
    **_table(
        Follow.IRRELEVANT,
        _SERVER,
        "help",
        "listen",
        "port",
        "tls_keyfile",
        "tls_certfile",
        "enable_cors_header",
        "max_upload_size",
        "output_directory",
        "date_based_output",
        "date_output_format",
        "temp_directory",
        "input_directory",
        "user_directory",
        "auto_launch",
        "disable_auto_launch",
        "preview_method",
        "preview_size",
        "default_hashing_function",
        "debug_hang",
        "dont_print_server",
        "quick_test_for_ci",
        "windows_standalone_build",
        "disable_metadata",
        "multi_user",
        "verbose",
        "log_stdout",
        "front_end_version",
        "front_end_root",
        "enable_compress_response_body",
        "comfy_api_base",
        "database_url",
        "disable_assets",
        "enable_assets",
        "enable_asset_hashing",
        "feature_flag",
        "list_feature_flags",
    ),
}


def unfollowed() -> list[str]:
    """Those that were given and are not followed yet, as a person writes them; and diffusers' variable."""
    named = [action for action in parser._actions if _is_named(action.dest) and _given(action)]
    kernel = variable(ATTENTION_VARIABLE)
    by_variable = [] if kernel in ("", ATTENTION) else [f"{ATTENTION_VARIABLE}={kernel}"]
    return [action.option_strings[-1] for action in named] + by_variable


def _is_named(name: str) -> bool:
    switch = SWITCHES.get(name)
    return switch is not None and switch.follow is Follow.NAMED


def _given(action: argparse.Action) -> bool:
    value = getattr(args, action.dest, action.default)
    return bool(value) and value != action.default


def tell_unfollowed() -> None:
    """One line of the log, where there is anything to say."""
    names = unfollowed()
    if names:
        logger.warning(
            "ComfyUI was started with %s, which %s not followed yet: models from Load Qwen-Image (low VRAM) "
            "are not affected.",
            ", ".join(names),
            "is" if len(names) == 1 else "are",
        )


def vae_dtype() -> torch.dtype | None:
    """What `auto` of dtype is for the VAE; None where no switch says."""
    for name, dtype in (("fp16_vae", torch.float16), ("bf16_vae", torch.bfloat16), ("fp32_vae", torch.float32)):
        if getattr(args, name, False):
            return dtype
    return None


def attention() -> str:
    """What `auto` of attention is, of `attention_choice.CHOICES`: in ComfyUI's own order. Chunks of queries are what
    both of its ways are that save memory."""
    if args.use_sage_attention:
        return SAGE.name
    if args.use_flash_attention:
        return FLASH.name
    if getattr(args, "use_ck_attention", False):  # since 0.33
        return KITCHEN_INT8.name
    if args.use_split_cross_attention or args.use_quad_cross_attention:
        return SPLIT.name
    return XFORMERS.name if comfy.model_management.xformers_enabled() else AUTO


def text_encoder_device(transformer: torch.device) -> torch.device:
    """What `auto` of text_encoder_device is. With --novram ComfyUI's own encoders, which are whole, go to the CPU; ours
    takes the room of two layers beside no transformer."""
    return transformer if args.novram else comfy.model_management.text_encoder_device()


def may_pin() -> bool:
    """Whether host memory may be page-locked."""
    return not args.disable_pinned_memory


def reserved_bytes() -> int:
    """Of the card, what is left to others: --reserve-vram or ComfyUI's default for this system, and --vram-headroom."""
    return _bytes(comfy.model_management.extra_reserved_memory()) + _bytes((args.vram_headroom or 0) * GIB)


def cache_ram_bytes() -> int:
    """ComfyUI empties its caches of outputs when less RAM is free, if a person set it; else 0."""
    given = getattr(args, "cache_ram", None) or ()
    return _bytes(given[0] * GIB) if given else 0


def _bytes(number: float) -> int:
    """Of a switch that takes any number: nothing where it is negative or none (NaN), and no more than any memory."""
    return int(min(number, _ALL)) if number > 0 else 0
