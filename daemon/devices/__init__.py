"""Where segments live."""

from __future__ import annotations

import re
from collections.abc import Mapping

from weightd.daemon.devices.base import Device, Segment
from weightd.daemon.devices.cpu import CpuDevice

__all__ = ["Device", "Segment", "open_devices"]

KINDS = {"cpu": CpuDevice}
"""Device kind → class, made with (name, capacity in bytes or None for the default)."""
_NAME = re.compile(r"([a-z]+)(:\d{1,4})?")


def open_devices(capacity: Mapping[str, int]) -> dict[str, Device]:
    """All devices of this machine by name; ``capacity`` overrides their default, in bytes.

    ``cpu:0`` and so on are further pools of host memory, there where ``capacity`` says how large they are. Raises
    ValueError where it names a device that is not here.
    """
    devices: dict[str, Device] = {}
    for name in ("cpu", *sorted(capacity.keys() - {"cpu"})):
        match = _NAME.fullmatch(name)
        kind = KINDS.get(match[1]) if match else None
        if kind is None:
            raise ValueError(f"capacity names {name}, this machine has devices of the kinds {', '.join(KINDS)}")
        devices[name] = kind(name, capacity.get(name))
    return devices
