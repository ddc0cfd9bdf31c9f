"""Where segments live."""

from __future__ import annotations

from collections.abc import Mapping

from weightd.daemon.devices import cpu, cuda
from weightd.daemon.devices.base import Copier, Device, Segment
from weightd.daemon.limits import CudaLimits

__all__ = ["Copier", "Device", "Segment", "open_devices"]


def open_devices(
    capacity: Mapping[str, int], limits: CudaLimits, host_fill: str = "auto", *, held: int = 0
) -> dict[str, Device]:
    """All devices of this machine by name; ``capacity`` overrides their default, in bytes.

    ``host_fill``: as ``CpuDevice`` has it. ``held`` are the bytes of host memory that the daemon before this one has
    left to adopt. Raises ValueError where ``capacity`` names a device that is not here.
    """
    found: list[Device] = [*cpu.discover(capacity, host_fill, held), *cuda.discover(capacity, limits)]
    devices = {device.name: device for device in found}
    if unknown := sorted(capacity.keys() - devices.keys()):
        raise ValueError(f"capacity names {unknown[0]}, this machine has {', '.join(devices)} (and cpu:N, made by it)")
    return devices
