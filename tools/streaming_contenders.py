"""Ways to run a transformer that is larger than the device: ours, and those of others.

Bytes are counted where each framework brings weights to the device: in ours at the block store, in diffusers at a
group's onload, in accelerate at the hook that sets a module's tensors, in mmgp where it makes a parameter on the
device. That is the same point on a CPU, where nothing is copied.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import accelerate.hooks
import torch
from accelerate import cpu_offload, disk_offload
from diffusers import QwenImageTransformer2DModel
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers_step import DEVICE, DTYPE, StepInputs, guide, guided_step, parameters_of
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.draft import least_ram_bytes
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.memory_plan import MemoryPlan
from qwenimage_lowvram.engine.planning.request import Limits
from qwenimage_lowvram.engine.runs.free_memory import HEADROOM_BYTES
from random_blocks import REAL_BLOCKS
from streaming_job import PROMPT_TOKENS, Job, Moved, Tier, forget_files
from torch import Tensor, nn

_MB = 1024**2


class NotHere(Exception):
    """This way cannot be measured on this machine; the message says why, as short as a table's cell."""


@dataclass(frozen=True)
class Contender:
    """A model that is ready to run. step: sigma, and whether another step follows -> the guided prediction."""

    step: Callable[[float, bool], Tensor]
    moved: Callable[[], Moved]
    once_bytes: int = 0
    once_seconds: float = 0.0


@contextmanager
def _ours(job: Job) -> Iterator[Contender]:
    hardware = Hardware.detect(DEVICE)
    transformer = QwenImageTransformer(open_checkpoint(job.folder), dtype=DTYPE, hardware=hardware)
    plan = plan_of_sixty(job, transformer)
    resident, held = _share(plan, job.blocks)
    transformer.load(resident, held)
    inputs = _inputs(job, transformer.config.joint_attention_dim)
    if job.tier is Tier.DISK:
        forget_files(job)
    start = time.perf_counter()
    transformer.modulation.announce(job.sigmas)
    synchronize()
    once_seconds = time.perf_counter() - start
    passes = 0

    def moved() -> Moved:
        store = transformer.store
        weights = store.fetched_bytes if hardware.host_device else store.copied_bytes
        return Moved(blocks=weights + passes * transformer.footprint.row_bytes, read=store.fetched_bytes)

    with transformer.session(slots=plan.slots, ring=plan.ring, mlp_chunk_tokens=plan.mlp_chunk_tokens) as session:

        def step(sigma: float, more: bool) -> Tensor:
            nonlocal passes
            passes += 1
            branches = [Branch(inputs.tokens, (inputs.grid,), prompt, None, sigma) for prompt in inputs.prompts]
            return guide(*session.forward(branches, more=more))

        yield Contender(step, moved, transformer.modulation.fetched_bytes, once_seconds)
    transformer.unload()


def plan_of_sixty(job: Job, transformer: QwenImageTransformer) -> MemoryPlan:
    """The plan for the whole model within the job's limits."""
    footprint = replace(transformer.footprint, blocks=REAL_BLOCKS)
    vram, ram = job.vram_bytes, job.ram_bytes
    if DEVICE.type == "cuda":
        vram -= HEADROOM_BYTES
    if job.tier is Tier.DISK and not footprint.host:  # on the host nothing is held beside the device
        ram = least_ram_bytes(footprint, job.request)
    return plan_memory(footprint, job.request, Limits(vram, ram))


def _share(plan: MemoryPlan, blocks: int) -> tuple[list[int], list[int]]:
    """As large a part of `blocks` blocks resident and held as the plan for sixty says, or less."""
    resident = _spread(len(plan.resident) * blocks // plan.blocks, range(blocks))
    rest = [i for i in range(blocks) if i not in resident]
    return resident, _spread(len(plan.held) * len(rest) // max(1, plan.streamed), rest)


def _spread(count: int, indices: range | list[int]) -> list[int]:
    return [indices[i * len(indices) // count] for i in range(count)]


def _diffusers_model(job: Job) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel.from_pretrained(job.folder, torch_dtype=DTYPE).eval()


def _inputs(job: Job, text_dim: int) -> StepInputs:
    return StepInputs.random(job.height // 16, job.width // 16, text_dim, PROMPT_TOKENS)


@dataclass
class _Peer:
    """diffusers' model in a peer's hands, and the count of what the peer moves."""

    job: Job
    moved: Moved = field(default_factory=Moved)

    def contender(self, model: QwenImageTransformer2DModel) -> Contender:
        inputs = _inputs(self.job, model.config.joint_attention_dim)
        return Contender(lambda sigma, more: guided_step(model, inputs, sigma), lambda: self.moved)


@contextmanager
def _resident(job: Job) -> Iterator[Contender]:
    """Everything on the device, without a limit; where not all blocks fit, those that do are run over and over."""
    model = _diffusers_model(job)
    if DEVICE.type == "cuda":
        blocks = model.transformer_blocks
        room = torch.cuda.mem_get_info()[0] - _activations(job) - 2 * HEADROOM_BYTES
        fitting = max(1, min(len(blocks), room // _bytes(blocks[0])))
        model.transformer_blocks = nn.ModuleList([blocks[i % fitting] for i in range(len(blocks))])
        model.to(DEVICE)
    yield _Peer(job).contender(model)


@contextmanager
def _group_offload(job: Job) -> Iterator[Contender]:
    peer = _Peer(job)
    model = _diffusers_model(job)
    apply_group_offloading(
        model,
        onload_device=DEVICE,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=DEVICE.type == "cuda",
        offload_to_disk_path=str(job.scratch) if job.tier is Tier.DISK else None,
    )
    with counted_groups(peer.moved, job.tier):
        yield peer.contender(model)


def counted_groups(moved: Moved, tier: Tier) -> AbstractContextManager[object]:
    """Within it, what diffusers' groups bring to the device is added to `moved`."""
    onload = ModuleGroup.onload_

    def counted(group: ModuleGroup) -> None:
        onload(group)
        in_block = isinstance(group.modules[0], QwenImageTransformerBlock)
        moved.add(sum(p.nbytes for p in parameters_of(group)), in_block=in_block, tier=tier)

    return patch.object(ModuleGroup, "onload_", counted)


@contextmanager
def _accelerate(job: Job) -> Iterator[Contender]:
    peer = _Peer(job)
    model = _diffusers_model(job)
    in_blocks = {id(module) for module in model.transformer_blocks.modules()}
    set_tensor = accelerate.hooks.set_module_tensor_to_device

    def counted(module: nn.Module, name: str, device: Any, value: Tensor | None = None, **options: Any) -> None:
        set_tensor(module, name, device, value=value, **options)
        if value is not None:
            peer.moved.add(value.nbytes, in_block=id(module) in in_blocks, tier=job.tier)

    if job.tier is Tier.DISK:
        disk_offload(model, str(job.scratch), execution_device=DEVICE)
    else:
        cpu_offload(model, execution_device=DEVICE)
    with patch.object(accelerate.hooks, "set_module_tensor_to_device", counted):
        yield peer.contender(model)


@contextmanager
def _mmgp(job: Job) -> Iterator[Contender]:
    if DEVICE.type != "cuda":
        raise NotHere("needs CUDA")
    if job.tier is Tier.DISK:
        raise NotHere("keeps all weights in RAM")
    try:
        from mmgp import offload
    except ImportError as error:
        raise NotHere(f"not installed ({error})") from error
    peer = _Peer(job)
    model = _diffusers_model(job)
    block = _bytes(model.transformer_blocks[0])
    base = _bytes(model) - job.blocks * block
    # its budget holds what stays and two blocks on their way; of sixty blocks, so many would stay
    spare = max(0, job.vram_bytes - HEADROOM_BYTES - _activations(job) - base - 2 * block)
    budget = base + 2 * block + spare * job.blocks // REAL_BLOCKS
    make = offload._make_parameter

    def counted(tensor: Tensor, requires_grad: bool = False) -> Any:
        if tensor.is_cuda:
            peer.moved.add(tensor.nbytes, in_block=True, tier=job.tier)  # what is outside the blocks stays
        return make(tensor, requires_grad=requires_grad)

    contender = peer.contender(model)
    offload.all(
        {"transformer": model},
        pinnedMemory=True,
        quantizeTransformer=False,
        budgets={"transformer": budget / _MB},
        asyncTransfers=True,
        verboseLevel=0,
    )
    with patch.object(offload, "_make_parameter", counted):
        yield contender


CONTENDERS: dict[str, Callable[[Job], AbstractContextManager[Contender]]] = {
    "ours": _ours,
    "diffusers group offload": _group_offload,
    "accelerate sequential": _accelerate,
    "mmgp": _mmgp,
    "resident": _resident,
}


def _activations(job: Job) -> int:
    hardware = Hardware(torch.device("cpu"), streams=False, pinned=False, prefetch=False, host_device=True)
    transformer = QwenImageTransformer(open_checkpoint(job.folder), dtype=DTYPE, hardware=hardware)
    return transformer.footprint.activation_bytes(job.request, None)


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
