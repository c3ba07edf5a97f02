"""ComfyUI's books of our transformer: what it holds on the device, and how it is asked to leave and comes back."""

from typing import Any

import comfy.hooks
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch

from ...engine.errors import InvalidRequest
from ...engine.lora.lora_file import LoraMatch
from .compiling import COMPILE_OPTIONS, is_compiling
from .graph_checks import check_hooks, refuse
from .native_lora import PREFIX, bypass_adapters, weight_of
from .stand_ins import refuse_compiling, refuse_reaching
from .value_checks import check_number
from .whole_lora import match_patches

# of ComfyUI's model: each says in which dtype it computes
_OF_DTYPE = {"manual_cast_dtype", "get_dtype", "get_dtype_inference"}


class LowVRAMPatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher whose model places its own weights; ComfyUI only keeps count of them.

    It derives from ModelPatcher, not from CoreModelPatcher: ComfyUI's dynamic VRAM must not touch the weights.
    `loras`: (LoRA, strength) in the order in which they are added.
    """

    loras: tuple[tuple[LoraMatch, float], ...] = ()

    def model_size(self) -> int:
        """Bytes that the model will hold on the device when it is loaded: what the present plan keeps resident."""
        return self.model.planned_bytes

    def loaded_size(self) -> int:
        return self.model.model_loaded_weight_memory

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        self.model.load_planned()
        self._keep_books(self.model.transformer.loaded_bytes, device_to, self.patches_uuid)
        for callback in self.get_all_callbacks(comfy.patcher_extension.CallbacksMP.ON_LOAD):
            callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        """Load what the plan says; it may have changed since the last time, ComfyUI's offer of memory has not."""
        self.unpatch_model(self.offload_device, unpatch_weights=False)
        self.patch_model(load_weights=False)
        before = self.loaded_size()
        try:
            self.load(device_to)
        except BaseException:
            self.detach()
            raise
        return self.loaded_size() - before

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False) -> int:
        freed = self.model.transformer.shrink(int(memory_to_free))
        self.model.model_loaded_weight_memory = self.model.transformer.loaded_bytes
        return freed

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        self.eject_model()
        if unpatch_weights and device_to is not None:
            self.model.transformer.unload()
            self._keep_books(0, device_to, None)
        for name, original in list(self.object_patches_backup.items()):
            comfy.utils.set_attr(self.model, name, original)
        self.object_patches_backup.clear()

    def pre_run(self) -> None:
        super().pre_run()
        self.model.begin_run()

    # LoRAs: carried by this MODEL, applied to the transformer when it is sampled with

    def clone(self, *args: Any, **kwargs: Any) -> "LowVRAMPatcher":
        other: LowVRAMPatcher = super().clone(*args, **kwargs)
        other.loras = self.loras
        return other

    def add_lora(self, lora: LoraMatch, strength: float) -> None:
        """Behind those that are there already."""
        self.loras = (*self.loras, (lora, strength))

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> list[Any]:
        """ComfyUI's own LoRA loaders come here; returns the keys that were used."""
        check_number("The LoRA's strength", strength_patch)
        if strength_model != 1.0:
            refuse(
                "Scaling the model's own weights (ModelMerge)",
                "merge with ComfyUI's own loaders.",
                code="graph.scaled_weights",
            )
        if not patches:
            raise InvalidRequest(
                "None of the LoRA's keys fits this model: it is a LoRA for another model.", code="lora.no_key_fits"
            )
        names = {key: patches[key] for key in patches if weight_of(key).startswith(PREFIX)}
        if names:
            transformer = self.model.transformer
            lora = match_patches(names, transformer.weights, transformer.other_names, model=transformer.model)
            self.add_lora(lora, strength_patch)
        return list(names)

    def set_injections(self, key: str, injections: list[Any]) -> None:
        """ComfyUI's bypass LoRA loaders come here; their LoRA is added to the weights, as the other loaders' is."""
        for injection in injections:
            adapters = bypass_adapters(injection)
            if not adapters:
                refuse(
                    "A node that injects code into modules ({key})",
                    "remove that node.",
                    code="graph.injected_code",
                    key=key,
                )
            for strength in dict.fromkeys(strength for _, strength in adapters.values()):
                given = {f"{name}.weight": adapter for name, (adapter, own) in adapters.items() if own == strength}
                self.add_patches(given, strength)

    def _keep_books(self, loaded_bytes: int, device: Any, patches_uuid: Any) -> None:
        self.model.device = torch.device(device)
        self.model.model_loaded_weight_memory = loaded_bytes
        self.model.model_lowvram = False
        self.model.lowvram_patch_counter = 0
        self.model.model_offload_buffer_memory = 0
        self.model.current_weight_patches_uuid = patches_uuid

    def deepclone_multigpu(self, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's multi-GPU and device nodes come here to read the model a second time."""
        refuse(
            "A second copy of the model on another device (MultiGPU, Select Model Device)",
            "remove that node, and choose the device, or all cards, as transformer_device in the loader.",
            code="graph.copy_on_another_device",
        )

    # what would change modules: ours hold nothing

    def get_model_object(self, name: str) -> Any:
        if name.startswith(PREFIX):
            refuse_reaching(name.removeprefix(PREFIX))
        return super().get_model_object(name)

    def add_object_patch(self, name: str, obj: Any) -> None:
        super().add_object_patch(name, obj)
        self.check_guests()

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Any) -> None:
        if is_compiling(wrapper_type, key):
            self.model_options.setdefault(COMPILE_OPTIONS, {})  # the node says with what
            return
        if "compile" in str(key):
            refuse_compiling()
        super().add_wrapper_with_key(wrapper_type, key, wrapper)

    def __deepcopy__(self, memo: Any) -> Any:
        refuse(
            "Copying the weights (a node that changes them in a copy)", "remove that node.", code="graph.copied_weights"
        )

    def check_guests(self) -> None:
        """Raise Unsupported for what other nodes have left with this MODEL and nothing would come of."""
        for name in self.object_patches:
            if f"{name}.".startswith(PREFIX):
                refuse_reaching(name.removeprefix(PREFIX))
        computed = self.model.get_dtype_inference()
        if _OF_DTYPE & self.object_patches.keys() or computed != self.model.transformer.dtype:
            self.set_model_compute_dtype(computed)
        if self.patches or self.weight_wrapper_patches:
            refuse("A node that changes weights in its own way", "use a LoRA loader.", code="graph.own_way_of_changing")
        if self.injections:
            refuse(
                "A node that injects code into modules ({names})",
                "remove it.",
                code="graph.injections",
                names=[*map(str, self.injections)],
            )

    # what would change or copy weights that are not there to be changed

    def get_key_patches(self, filter_prefix: Any = None) -> Any:
        refuse(
            "Merging models (ModelMerge, CLIPMerge)",
            "merge with ComfyUI's own loaders, then load the result.",
            code="graph.merged_models",
        )

    def add_weight_wrapper(self, name: str, function: Any) -> None:
        refuse("A node that wraps weights", "remove that node.", code="graph.wrapped_weights")

    def set_model_compute_dtype(self, dtype: Any) -> None:
        refuse(
            "Setting the compute dtype (ModelComputeDtype)", "choose dtype in the loader.", code="graph.compute_dtype"
        )

    def model_state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
        refuse(
            "Saving the model (ModelSave, CheckpointSave)",
            "copy the file it was loaded from.",
            code="graph.saved_model",
        )

    def register_all_hook_patches(self, hooks: comfy.hooks.HookGroup, *args: Any, **kwargs: Any) -> Any:
        check_hooks(hooks)
        return super().register_all_hook_patches(hooks, *args, **kwargs)
