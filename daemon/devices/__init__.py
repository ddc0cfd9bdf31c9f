"""Where segments live."""

from __future__ import annotations

from collections.abc import Mapping

from weightd.daemon.devices.base import Device, Segment
from weightd.daemon.devices.cpu import CpuDevice

__all__ = ["Device", "Segment", "open_devices"]

KINDS = {"cpu": CpuDevice}
"""Device kind → class, made with (name, capacity in bytes or None for the default)."""


def open_devices(capacity: Mapping[str, int]) -> dict[str, Device]:
    """All devices of this machine by name; ``capacity`` overrides their default, in bytes.

    Raises ValueError where it names a device that is not here.
    """
    devices: dict[str, Device] = {"cpu": CpuDevice("cpu", capacity.get("cpu"))}
    if unknown := capacity.keys() - devices.keys():
        raise ValueError(f"capacity names {', '.join(sorted(unknown))}, this machine has {', '.join(devices)}")
    return devices
