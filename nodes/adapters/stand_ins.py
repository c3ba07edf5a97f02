"""What other nodes find in our MODEL where ComfyUI's own has modules: names of layers, and refusals in words."""

from collections.abc import Mapping
from typing import Any

import torch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from torch import Tensor, nn

from .graph_checks import refuse

# of ComfyUI's own transformer, beside its layers: methods, and what its __init__ sets
_NATIVE = frozenset({*vars(QwenImageTransformer2DModel), "pe_embedder", "default_ref_method"})
_OF_A_LAYER = ("in_features", "out_features")
# what nodes set in the place of ComfyUI's, and ours calls
_CALLED = ("forward", "_forward")


class WeightShape(Tensor):
    """A weight's shape and dtype where its numbers are not: on the meta device. What would change or copy numbers is
    refused; what only makes another shape of it is not."""

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "WeightShape":
        return torch.empty(shape, device="meta").as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(getattr(func, "__name__", func))
        changes = name.endswith("_") and not name.endswith("__")
        if changes or name in ("__setitem__", "__reduce_ex__", "__set__") or "out" in (kwargs or {}):
            refuse_reaching(f"weights, {name}")
        try:
            return super().__torch_function__(func, types, args, kwargs or {})
        except NotImplementedError:  # of the meta device: it has no numbers
            return refuse_reaching(f"weights, {name}")


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
            return WeightShape.of(self._parts.weights[path])
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
    """A module whose layers are looked for as ComfyUI's own has them, and are `Part`s.

    What torch's modules do to their layers and weights is refused: it would find none, and do nothing.
    """

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

    def guard(self) -> None:
        """From now on refuse to have anything else in the place of what is there, or what ComfyUI's own model has."""
        self.__dict__["_guarded"] = frozenset({*self.__dict__, *_NATIVE, *self._parts.names} - {*_CALLED, "training"})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_guarded", ()):
            refuse_reaching(name)
        super().__setattr__(name, value)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """Also as a part of ComfyUI's model: who looks for layers or weights would find none."""
        refuse_reaching("named_modules, parameters")

    def named_children(self) -> Any:
        refuse_reaching("children")

    def get_submodule(self, target: str) -> Any:
        refuse_reaching(target)

    def apply(self, fn: Any) -> Any:
        refuse_reaching("apply")

    def add_module(self, name: str, module: Any) -> None:
        refuse_reaching(name)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        refuse_reaching("load_state_dict")

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Tensor]:
        """The weights' names and shapes."""
        return {f"{prefix}{name}": WeightShape.of(shape) for name, shape in self._parts.weights.items()}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        refuse_compiling()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Where the model is computed, and in which dtype, is the loader's to say; ComfyUI's model passes devices on
        in another way."""
        if any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values())):
            refuse_reaching("to, of another dtype")
        return self

    def train(self, mode: bool = True) -> Any:
        self.training = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return self  # `to` of ComfyUI's whole model comes here

    def _refuse_dtype(self) -> Any:
        refuse_reaching("half, float, of another dtype")

    half = bfloat16 = float = double = _refuse_dtype

    @property
    def watched(self) -> bool:
        """Whether another node looks at each call, or answers it."""
        return bool(self._forward_hooks or self._forward_pre_hooks or {"forward", "_forward"} & self.__dict__.keys())


def refuse_reaching(path: str) -> Any:
    refuse(
        "A node that reaches into the model (diffusion_model.{path})",
        "remove that node. The weights are kept outside of modules, so nothing done to a module changes the image.",
        code="graph.reaches_into_model",
        path=path,
    )


def refuse_compiling() -> Any:
    refuse(
        "Compiling the model only in part, or in another way than TorchCompileModel does,",
        "use TorchCompileModel instead of that node.",
        code="graph.compiled_model",
    )
