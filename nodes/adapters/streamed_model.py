"""A streamed transformer as ComfyUI's MODEL, whichever network it is: around a run, its evaluations and their calls.

A network adds two small classes: what is its own of ComfyUI's model (`LowVRAMModel`), and the translation of a call of
the diffusion model to branches (`DiffusionModel`).
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Protocol

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...engine.compute.step_schedules import StepCache
from ...engine.errors import Unsupported
from ...engine.models.layer_rows import shapes_by_any_name
from ...engine.models.network import Hooked
from ...engine.models.streamed_transformer import StreamedTransformer
from ...engine.planning.memory_plan import MemoryPlan
from ...engine.planning.request import Controls, SamplingRequest
from ...engine.reports.memory_report import MemoryReport
from ...engine.runs.branch_keys import BranchKey
from ...engine.runs.sampling_run import SamplingRun
from ...engine.runs.timeline import Timeline
from .attention import check_override
from .block_patches import BlockPatches, PatchImages, has_patches, sees_each_call
from .controlnets import ControlNets
from .graph_checks import refuse
from .lockstep import Lockstep
from .native_lora import PREFIX
from .progress import executing_prompt_id
from .run_conditions import Conds
from .stand_ins import WithoutLayers, refuse_compiling
from .step_caches import identities, numbered


class ModelCall(Protocol):
    """One call of the diffusion model by ComfyUI: a batch of images, each a branch of the network's."""

    patches: BlockPatches | None
    identities: Sequence[BranchKey]  # of each image of the batch, the same in every step

    @property
    def batch(self) -> int: ...

    @property
    def timesteps(self) -> Tensor:
        """Of each image of the batch, (B,) in 0..1 in fp32, wherever they lie."""

    def branches(self, timesteps: Sequence[float]) -> list[Any]:
        """One for each image of the batch, with these as the host knows them."""

    def unpack(self, answer: Tensor) -> Tensor:
        """Of a branch, as ComfyUI has it, with its batch dimension."""


class ModelCalls:
    """What ComfyUI's calls of the model need: the transformer and the present run. Refers to no module of ComfyUI's,
    which would be a circle that keeps an unloaded model alive."""

    def __init__(self, transformer: StreamedTransformer[Any, Any]) -> None:
        self.transformer = transformer
        self.lockstep = Lockstep()
        self.run: SamplingRun | None = None
        self.sigmas = torch.empty(0)  # of the present run
        self.controls: ControlNets | None = None
        self.images: PatchImages | None = None
        self.override: Any = None  # of attention, for the present run

    def run_together(self, calls: list[ModelCall]) -> list[Tensor]:
        """The answers to several calls in one visit of the blocks."""
        if self.run is None:
            raise Unsupported(
                "The model was called outside a sampler. Use a sampler node.", code="graph.called_outside_of_sampler"
            )
        hooked = []
        bounds = list(pairwise(accumulate((call.batch for call in calls), initial=0)))
        for call, (first, last) in zip(calls, bounds, strict=True):
            if call.patches is not None:
                hooked.append(Hooked(range(first, last), call.patches))

        def branches(timesteps: Sequence[float]) -> list[Any]:
            own = [timesteps[first:last] for first, last in bounds]
            return [branch for call, of_call in zip(calls, own, strict=True) for branch in call.branches(of_call)]

        # what patches see cannot be taken back, and calls that run alone ask for one timestep several times
        ahead = self.lockstep.running and not hooked
        asked = torch.cat([call.timesteps for call in calls])
        keys = numbered(key for call in calls for key in call.identities)
        answers = iter(self.run.forward_at(asked, branches, hooked, ahead=ahead, keys=keys))
        return [torch.cat([call.unpack(next(answers)) for _ in range(call.batch)]) for call in calls]


class DiffusionModel(WithoutLayers):
    """What BaseModel.apply_model calls. Has no parameters: nothing here is ComfyUI's to move, cast or patch.

    A network's own has a `forward` that ends in `answer`.
    """

    def __init__(self, calls: ModelCalls) -> None:
        transformer = calls.transformer
        super().__init__(shapes_by_any_name(transformer.weights, transformer.other_names))
        self._calls = calls
        self.dtype = calls.transformer.dtype

    def answer(self, call: ModelCall, x: Tensor, options: dict[str, Any]) -> Tensor:
        """To a call with latents `x`: with all other calls of the same evaluation, where they may share a visit."""
        calls = self._calls
        check_override(options, calls.override)
        if calls.lockstep.active and (reason := sees_each_call(options)):
            refuse(
                "A hook that sets a model patch ({reason})",
                "set the patch on the model, without a hook.",
                code="graph.hooked_patch",
                reason=reason,
            )
        call.identities = identities(options, call.batch)
        return calls.lockstep.call(call, calls.run_together, lambda: torch.zeros_like(x))


class LowVRAMModel:
    """Stands before ComfyUI's own class of a network's model among the bases of ours: our transformer in the place of
    its network. Latent format, model sampling and conditions are ComfyUI's. The weights lie outside of every nn.Module.
    """

    DIFFUSION_MODEL: ClassVar[type[DiffusionModel]]

    transformer: Any  # the network's StreamedTransformer
    diffusion_model: DiffusionModel
    model_sampling: Any
    latent_format: Any
    model_loaded_weight_memory: int  # ComfyUI's, which asks it how much a model holds on its device

    def __init__(
        self,
        config: Any,
        transformer: StreamedTransformer[Any, Any],
        limit_bytes: int | None,
        ram_limit_bytes: int | None = None,
        timeline: Timeline | None = None,
        advice: str = "",
        step_cache: StepCache | None = None,
        compiling: bool = False,
    ) -> None:
        """`config`: ComfyUI's of the network, with disable_unet_model_creation. A limit of None uses what is free."""
        config.set_inference_dtype(transformer.dtype, None)
        super().__init__(config, device=comfy.model_management.unet_offload_device())  # type: ignore[call-arg]
        self.transformer = transformer
        self.attention = transformer.attending  # what the loader chose
        self.limit_bytes = limit_bytes
        self.ram_limit_bytes = ram_limit_bytes
        self.calls = ModelCalls(transformer)
        self.diffusion_model = self.DIFFUSION_MODEL(self.calls)
        self.plan: MemoryPlan | None = None
        self.last_report: MemoryReport | None = None
        self.timeline = timeline or Timeline(executing_prompt_id)
        self.advice = advice
        self.step_cache = step_cache
        self.compiling = compiling
        self.exact = transformer.exact  # compiled blocks are then used only where they compute the same bits

    # what a network says of a run

    def check_run(self, conds: dict[str, list[dict[str, Any]]], noise: Tensor) -> None:
        """Raise Unsupported or InvalidRequest for what the graph asks of the network that it does not do; `conds`: the
        graph's, `noise`: as large as the latents."""
        raise NotImplementedError

    def request_of(self, conds: Conds, noise: Tensor, sigmas: Tensor) -> SamplingRequest:
        """What is to be planned for. Raises InvalidRequest for prompts of other models."""
        raise NotImplementedError

    def check_beside(self, conds: dict[str, list[dict[str, Any]]], options: dict[str, Any]) -> None:
        """Raise Unsupported for ControlNets and patches around blocks, whose results the network would not see: all of
        them, but where it has its own way with them."""
        if any(entry.get("control") is not None for entries in conds.values() for entry in entries or ()):
            refuse("A ControlNet for this kind of model", "remove the ControlNet.", code="graph.no_controlnets")
        if has_patches(options):
            refuse("A patch around this model's blocks", "remove the node that sets it.", code="graph.no_block_patches")

    def controls_of(
        self, conds: Conds, guider: Any, noise: Tensor, request: SamplingRequest, beside: Sequence[ModelPatcher]
    ) -> Controls:
        """What runs beside the transformer: nothing, but where a network has ControlNets or patches."""
        return Controls()

    # what ComfyUI asks

    def _apply_model(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_compiled()
        return super()._apply_model(*args, **kwargs)  # type: ignore[misc]

    def _refuse_compiled(self) -> None:
        if type(self.diffusion_model) is not self.DIFFUSION_MODEL:
            refuse_compiling()

    @property
    def planned_bytes(self) -> int:
        """What the present plan keeps on the device between steps."""
        return self.plan.resident_bytes if self.plan else self.transformer.footprint.outside_bytes

    def load_planned(self) -> None:
        if self.calls.run is not None:
            self.calls.run.load()
            self.plan = self.calls.run.plan
        elif self.plan is not None:
            plan = self.plan
            self.transformer.load(plan.resident, plan.held, plan.secondaries, beside=plan.beside)
        else:
            self.transformer.load(())

    def begin_run(self) -> None:
        """The resident weights are on the device, and the graph's own model sampling is in place."""
        if self.calls.run is not None:
            sigmas = self.calls.sigmas
            self.calls.run.begin(self.model_sampling.timestep(sigmas[sigmas > 0]).float().tolist())

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        """What a run takes on the device beside the resident weights."""
        if self.calls.lockstep.active:
            return 0  # the calls must be made alike when they are recorded and when they are replayed
        if self.plan is None:
            return 0
        # the weights of ControlNets and model patches are counted by ComfyUI itself
        return self.plan.peak_bytes - self.plan.resident_bytes - self.plan.request.controls.weights_bytes

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The weights' names and shapes without the weights: ComfyUI's LoRA loaders look for their keys here."""
        return self.diffusion_model.state_dict(prefix=PREFIX)

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
        refuse(
            "Saving the model (ModelSave, CheckpointSave)",
            "copy the file it was loaded from.",
            code="graph.saved_model",
        )
