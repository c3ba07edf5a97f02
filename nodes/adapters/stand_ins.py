"""What other nodes find in our MODEL where ComfyUI's own has modules: names of layers, and refusals in words."""

from collections.abc import Mapping
from typing import Any

import torch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from torch import Tensor, nn

from .unsupported import refuse

# of ComfyUI's own transformer, beside its layers: methods, and what its __init__ sets
_NATIVE = frozenset({*vars(QwenImageTransformer2DModel), "pe_embedder", "default_ref_method"})
_OF_A_LAYER = ("in_features", "out_features")


class Parts:
    """The layers of a transformer by their names; holds no weight."""

    def __init__(self, weights: Mapping[str, tuple[int, ...]]) -> None:
        self.weights = weights
        words = [name.split(".") for name in weights]
        self.names = frozenset(".".join(word[:count]) for word in words for count in range(1, len(word)))

    def of_model(self, name: str) -> "Part":
        """What the model has under that name. Raises AttributeError where ComfyUI's own model has nothing, so that
        nodes may probe for other models; Unsupported for what is not here."""
        if name in self.names:
            return Part(self, name)
        if name in _NATIVE:
            refuse_reaching(name)
        raise AttributeError(f"Qwen-Image has no {name!r}")


class Part:
    """A module by its name: it has parts, and the shape of its weight, which is all that ComfyUI's bypass LoRA asks
    for. What would use, change or count modules is refused: nothing would come of it."""

    def __init__(self, parts: Parts, path: str) -> None:
        self.__dict__.update(_parts=parts, _path=path)

    def __getattr__(self, name: str) -> Any:
        path = f"{self._path}.{name}"
        if path in self._parts.weights:
            return torch.empty(self._parts.weights[path], device="meta")
        if path in self._parts.names:
            return Part(self._parts, path)
        if not name.startswith("__") and (hasattr(nn.Module, name) or name in _OF_A_LAYER):
            refuse_reaching(path)
        raise AttributeError(f"Qwen-Image has no {path!r}")

    def __getitem__(self, index: int) -> Any:
        return getattr(self, str(index))

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_reaching(f"{self._path}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        raise refuse_reaching(self._path)

    def __iter__(self) -> Any:
        refuse_reaching(self._path)

    def __len__(self) -> int:
        raise refuse_reaching(self._path)


class WithoutLayers(nn.Module):
    """A module whose layers are looked for as ComfyUI's own has them, and are `Part`s."""

    def __init__(self, weights: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._parts = Parts(weights)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_parts" not in self.__dict__:
                raise
        return self._parts.of_model(name)

    def named_modules(self, memo: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Only as a part of ComfyUI's model: who looks for layers or weights here would find none."""
        if memo is None:
            refuse_reaching("named_modules, parameters")
        return super().named_modules(memo, *args, **kwargs)

    @property
    def watched(self) -> bool:
        """Whether another node looks at each call, or answers it."""
        return bool(self._forward_hooks or self._forward_pre_hooks or {"forward", "_forward"} & self.__dict__.keys())


def refuse_reaching(path: str) -> Any:
    refuse(
        f"A node that reaches into the model (diffusion_model.{path})",
        "remove that node. The weights lie outside of modules; nothing that is done to a module changes the image.",
    )


def refuse_compiling() -> Any:
    refuse("Compiling the model (TorchCompileModel and others)", "remove the compile node.")
