"""Remember this machine's speeds from run to run: measured once, corrected by every run."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from ..compute.stored_products import StoredProduct
from ..hardware import Hardware
from ..planning.forecast import Speeds
from .machine_speeds import MEASURING_BYTES, measure_bus, measure_disk, measure_flops, measure_memory
from .remembered import RememberedFacts

VERSION = 2


class KnownSpeeds:
    """The speeds of one device in one dtype, and of the folder that holds a model."""

    def __init__(
        self,
        hardware: Hardware,
        dtype: torch.dtype,
        model_file: Path,
        *,
        file: Path | None,
        device_name: str,
        make_room: Callable[[int], None] = lambda nbytes: None,
        product: StoredProduct | None = None,
        others: "Mapping[str, KnownSpeeds] | None" = None,
    ) -> None:
        """`file`: where they are remembered; None: in this object alone. `device_name`: by which the device is known
        from run to run. `make_room` is called before the device is measured, with the bytes that this takes there.
        product: by which most linear layers compute on weights as stored; None: on decoded ones. others: of further
        devices, by torch's names for them."""
        self._hardware, self._dtype, self._model_file = hardware, dtype, model_file
        self._make_room, self._product = make_room, product
        self._facts = RememberedFacts(file, VERSION, "Speeds")
        self._device_key = f"{device_name}, {str(dtype).removeprefix('torch.')}"
        if product is not None:
            self._device_key += f", {product.name} by {product.backend}"
        self._others = others or {}
        # of a link that leads to itself, resolve() makes an error
        self._disk_key = str(Path(os.path.realpath(model_file)).parent)

    def remembered(self) -> Speeds | None:
        """None where something has not been measured yet; measures nothing."""
        known = self._read()
        device, disk = known.get(self._device_key), known.get(self._disk_key)
        return None if device is None or disk is None else Speeds(**device, **disk)

    def get(self) -> Speeds:
        """As remembered; measured where this machine is new, which takes a second."""
        known = self._read()
        device, disk = known.get(self._device_key), known.get(self._disk_key)
        if device is None:
            if self._hardware.device.type != "cpu":
                self._make_room(MEASURING_BYTES)
            device = {
                "flops": measure_flops(self._hardware, self._dtype, self._product),
                "bus_bytes": measure_bus(self._hardware),
                "memory_bytes": measure_memory(self._hardware),
            }
        if disk is None:
            disk = {"disk_bytes": measure_disk(self._model_file)}
        speeds = Speeds(**device, **disk)
        self.put(speeds)
        return speeds

    def on(self, device: str) -> Speeds:
        """Of one of `others`; of one that is not among them, this one's."""
        return self._others.get(device, self).get()

    def put(self, speeds: Speeds) -> None:
        """Remember; a folder that cannot be written costs a measurement the next time."""
        values = asdict(speeds)
        disk = {"disk_bytes": values.pop("disk_bytes")}
        known = self._read()
        if known.get(self._device_key) == values and known.get(self._disk_key) == disk:
            return
        known |= {self._device_key: values, self._disk_key: disk}
        self._facts.write(known)

    def _read(self) -> dict[str, dict[str, float]]:
        """What is remembered, entries that are not whole left out."""
        names = ({"flops", "bus_bytes", "memory_bytes"}, {"disk_bytes"})
        return {
            key: entry
            for key, entry in self._facts.read().items()
            if isinstance(entry, dict)
            and set(entry) in names
            and all(isinstance(value, (int, float)) and value > 0 for value in entry.values())
        }
