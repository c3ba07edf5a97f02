"""Copies between host and device, and between two devices, by CUDA's and PyTorch's rules."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .results import Layout
from .tensors import DeviceTensor

if TYPE_CHECKING:
    from .device import SimulatedGPU


class Copies:
    """From and to page-locked memory with non_blocking they are asynchronous, and read or write the host's bytes when
    they run; from other host memory the bytes are taken at once, and to it the host waits, as it does without
    non_blocking; from device to device the current streams of both wait for each other."""

    def __init__(self, gpu: "SimulatedGPU") -> None:
        self._gpu = gpu

    def to(self, source: Tensor, device: torch.device, dtype: torch.dtype, non_blocking: bool) -> Tensor:
        """A copy of `source` on `device`."""
        if device.type == "cpu":
            out = torch.empty(source.size(), dtype=dtype)
            if non_blocking:
                self._gpu.page_locks.lend(out)
        else:
            like = torch.empty_strided(source.size(), source.stride(), device="meta", dtype=dtype)
            out = self._gpu.new(Layout.of(torch.empty_like(like)), device, "a copy")  # strides as torch keeps them
        self.copy(out, source, non_blocking)
        return out

    def copy(self, out: Tensor, source: Tensor, non_blocking: bool) -> None:
        if not isinstance(out, DeviceTensor):
            assert isinstance(source, DeviceTensor)
            self._to_host(out, source, non_blocking)
        elif isinstance(source, DeviceTensor):
            self._between(out, source)
        else:
            self._to_device(out, source, non_blocking)

    def _to_host(self, out: Tensor, source: DeviceTensor, non_blocking: bool) -> None:
        stream, what = self._gpu.current_stream(source.device), "copy to the host"
        of = source.inner
        stream.begin()
        self._gpu.touch(source, stream, False, what)
        if non_blocking and self._copies_by_itself(out, source):
            self._gpu.page_locks.device_accesses(out, stream, True, what)
            with torch.inference_mode(False):
                to = out.view(out.size())

            def write() -> None:
                with torch.inference_mode(to.is_inference()):  # which nobody else may write to
                    to.copy_(of)

            stream.issue(write, self._seconds(source))
            return
        stream.issue(lambda: None, self._seconds(source))
        stream.host_waits(what)
        self._gpu.page_locks.host_access(out, True, what)
        out.copy_(of)

    def _copies_by_itself(self, one: Tensor, other: Tensor) -> bool:
        """Whether the device can copy between these without the host, one of which lies there."""
        on_host = other if isinstance(one, DeviceTensor) else one
        whole = one.dtype == other.dtype and one.is_contiguous() and other.is_contiguous()
        return whole and self._gpu.page_locks.holds(on_host)

    def _between(self, out: DeviceTensor, source: DeviceTensor) -> None:
        here, there = self._gpu.current_stream(source.device), self._gpu.current_stream(out.device)
        to, of, what = out.inner, source.inner, f"copy to {out.device}"
        here.wait_stream(there)
        here.begin()
        self._gpu.touch(source, here, False, what)
        self._gpu.touch(out, here, True, what)
        here.issue(lambda: to.copy_(of), self._seconds(source))
        there.wait_stream(here)

    def _to_device(self, out: DeviceTensor, source: Tensor, non_blocking: bool) -> None:
        stream, what = self._gpu.current_stream(out.device), "copy to the device"
        later = non_blocking and self._copies_by_itself(out, source)
        stream.begin()
        if later:
            self._gpu.page_locks.device_accesses(source, stream, False, what)
        else:
            self._gpu.page_locks.host_access(source, False, what)
        if non_blocking and not later:
            self._gpu.pageable[self._gpu.site()] += 1
        self._gpu.touch(out, stream, True, what)
        with torch.inference_mode(False):
            to, of = out.inner, source if later else source.clone()
        stream.issue(lambda: to.copy_(of), self._seconds(source))
        if not non_blocking:
            stream.host_waits(what)

    def _seconds(self, moved: Tensor) -> float:
        costs = self._gpu.costs
        return 0.0 if costs is None else costs.copy_seconds(moved.numel() * moved.element_size())
