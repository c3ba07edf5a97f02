"""ComfyUI's books of our transformer: what it holds on the device, and how it is asked to leave and comes back."""

from typing import Any

import comfy.hooks
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch

from .unsupported import check_hooks, refuse


class LowVRAMPatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher whose model places its own weights; ComfyUI only keeps count of them.

    It derives from ModelPatcher, not from CoreModelPatcher: ComfyUI's dynamic VRAM must not touch the weights.
    """

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

    def _keep_books(self, loaded_bytes: int, device: Any, patches_uuid: Any) -> None:
        self.model.device = torch.device(device)
        self.model.model_loaded_weight_memory = loaded_bytes
        self.model.model_lowvram = False
        self.model.lowvram_patch_counter = 0
        self.model.model_offload_buffer_memory = 0
        self.model.current_weight_patches_uuid = patches_uuid

    # what would change or copy weights that are not there to be changed

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        refuse("A LoRA or another change of weights (Load LoRA, Merge)", "remove that node for now.")

    def get_key_patches(self, filter_prefix: Any = None) -> Any:
        refuse("Merging models (ModelMerge, CLIPMerge)", "merge with ComfyUI's own loaders, then load the result.")

    def add_weight_wrapper(self, name: str, function: Any) -> None:
        refuse("A node that wraps weights", "remove that node.")

    def set_model_compute_dtype(self, dtype: Any) -> None:
        refuse("Setting the compute dtype (ModelComputeDtype)", "choose dtype in the loader.")

    def model_state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
        refuse("Saving the model (ModelSave, CheckpointSave)", "copy the file it was loaded from.")

    def register_all_hook_patches(self, hooks: comfy.hooks.HookGroup, *args: Any, **kwargs: Any) -> Any:
        check_hooks(hooks)
        return super().register_all_hook_patches(hooks, *args, **kwargs)
