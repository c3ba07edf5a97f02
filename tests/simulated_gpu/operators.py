"""What an operator on device tensors is: a view, work on the current stream, or a question that the host waits for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .results import Layout, results_of
from .streams import Stream
from .tensors import DeviceTensor, map_tensors, on_host, tensors_in, view_of

if TYPE_CHECKING:
    from .device import SimulatedGPU

aten = torch.ops.aten
MORE_VIEWS = {aten._unsafe_view.default, aten.lift_fresh.default}
# the host has to know the result, or its size
ANSWERS = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
}
EMPTY = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


@cache
def _writes(func: Any) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


@cache
def _is_view(func: Any) -> bool:
    shares = any(r.alias_info is not None for r in func._schema.returns)
    return func in MORE_VIEWS or (shares and not _writes(func))


@dataclass(frozen=True)
class Call:
    """An operator and what it is called with; at least one argument or its device is the GPU's."""

    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.func._schema.name)

    @cached_property
    def tensors(self) -> list[Tensor]:
        return list(tensors_in((self.args, tuple(self.kwargs.values()))))

    def arguments(self) -> Iterator[tuple[Any, Any]]:
        """(what the schema says, value) of each."""
        schema = self.func._schema.arguments
        yield from zip(schema, self.args, strict=False)
        named = {argument.name: argument for argument in schema}
        yield from ((named[name], value) for name, value in self.kwargs.items())

    @property
    def writes(self) -> bool:
        return _writes(self.func)

    @property
    def is_view(self) -> bool:
        return _is_view(self.func)

    @property
    def is_answer(self) -> bool:
        """Whether the host must wait for it."""
        by_mask = self.func is aten.index.Tensor and any(t is not None and t.dtype == torch.bool for t in self.args[1])
        return by_mask or self.func in ANSWERS


@dataclass(frozen=True)
class FunctionCall(Call):
    """A function of torch's that is one kernel on a device and on the host, but would come here taken apart."""

    name = "scaled_dot_product_attention"
    writes = is_view = is_answer = False


class Operators:
    """Runs calls on one SimulatedGPU, whose lock is held."""

    def __init__(self, gpu: "SimulatedGPU") -> None:
        self._gpu = gpu

    def run(self, call: Call) -> Any:
        given = [t for t in call.tensors if isinstance(t, DeviceTensor)]
        if call.is_view:
            return view_of(given[0], call.func, call.args, call.kwargs)
        device = torch.device(call.kwargs.get("device") or given[0].device)
        if call.func in EMPTY:  # of a tensor that it is to be like, only the layout counts
            return map_tensors_of(results_of(call.func, call.args, call.kwargs), self._gpu, device, call.name)
        self._require_one_device(call, device)
        stream = self._gpu.current_stream(device)
        if call.is_answer:
            return self._answer(call, given, stream)
        if call.writes:
            return self._in_place(call, stream)
        return self._new(call, given, stream)

    def _require_one_device(self, call: Call, device: torch.device) -> None:
        for tensor in call.tensors:
            if tensor.device == device or (tensor.dim() == 0 and not isinstance(tensor, DeviceTensor)):
                continue
            if isinstance(tensor, DeviceTensor) or "index" not in call.name:
                raise RuntimeError(f"Expected all tensors to be on the same device: {call.name} at {self._gpu.site()}")
            self._gpu.note_wait(f"{call.name} with an index on the host", self._gpu.current_stream(device).point())

    def _answer(self, call: Call, given: Sequence[DeviceTensor], stream: Stream) -> Any:
        stream.begin()
        for tensor in given:
            self._gpu.touch(tensor, stream, False, call.name)
        stream.launch(lambda: None, self._seconds(call, given))
        stream.host_waits(call.name)
        result = call.func(*on_host(call.args), **on_host(call.kwargs))
        return map_tensors(lambda value: self._gpu.put(value, stream, call.name), result)

    def _in_place(self, call: Call, stream: Stream) -> Any:
        stream.begin()
        for argument, value in call.arguments():
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors_in(value):
                if isinstance(tensor, DeviceTensor):
                    self._gpu.touch(tensor, stream, writes, call.name)
        func, (args, kwargs) = call.func, self._taken(call)  # not the call: it would keep the tensors' memory
        stream.launch(lambda: func(*args, **kwargs), self._seconds(call, call.tensors))
        return _written(call)

    def _new(self, call: Call, given: Sequence[DeviceTensor], stream: Stream) -> Any:
        layouts = results_of(call.func, call.args, call.kwargs)
        results = map_tensors_of(layouts, self._gpu, stream.device, call.name)
        stream.begin()
        for tensor in given:
            self._gpu.touch(tensor, stream, False, call.name)
        inners = []
        for tensor in tensors_in(results):
            assert isinstance(tensor, DeviceTensor)
            self._gpu.touch(tensor, stream, True, call.name)
            inners.append(tensor.inner)
        func, (args, kwargs) = call.func, self._taken(call)  # not the call: it would keep the tensors' memory

        def work() -> None:
            for inner, value in zip(inners, tensors_in(func(*args, **kwargs)), strict=True):
                inner.copy_(value)

        stream.launch(work, self._seconds(call, [*given, *tensors_in(results)]))
        return results

    def _taken(self, call: Call) -> tuple[Any, dict[str, Any]]:
        """Its arguments as the work will find them: what lies on the host is taken now."""

        def take(value: Any) -> Any:
            if isinstance(value, DeviceTensor):
                return value.inner
            return value.clone() if isinstance(value, Tensor) else value

        args, kwargs = map_tensors(take, tuple(call.args)), map_tensors(take, dict(call.kwargs))
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        return args, kwargs

    def _seconds(self, call: Call, tensors: Sequence[Tensor]) -> float:
        costs = self._gpu.costs
        return 0.0 if costs is None else costs.kernel_seconds(call.func, call.args, tensors)


def map_tensors_of(layouts: Any, gpu: "SimulatedGPU", device: torch.device, what: str) -> Any:
    """New device memory in each Layout's place."""
    if isinstance(layouts, Layout):
        return gpu.new(layouts, device, what)
    return tree_map_only(Layout, lambda layout: gpu.new(layout, device, what), layouts)


def _written(call: Call) -> Any:
    """What an operator that writes returns: its own arguments."""
    written = [v for a, v in call.arguments() if a.alias_info is not None and a.alias_info.is_write]
    returns = call.func._schema.returns
    if not returns:
        return None
    return written[0] if len(returns) == 1 else tuple(written)
