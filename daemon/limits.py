"""Bounds, as the settings have them, for those who keep them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FillLimits:
    """Bounds on what one stage may use at once."""

    threads: int
    """Reading threads, for sources that read in threads."""
    in_flight_bytes: int
    """Bytes asked of an object store and not yet landed."""
    extent_bytes: int
    """Size that extents grow to, and of a bounce buffer."""
    bounce_buffers: int
    """Bounce buffers of that size."""
    retry_deadline: float
    """Seconds from the first failure of an extent after which it is given up, and without any progress at all."""


@dataclass(frozen=True)
class NodeLimits:
    """Bounds on what the node does at once."""

    concurrent_loads: int
    """Stages that load at the same time, for each kind of source and device."""
    max_queued: int
    """Stages that wait for their turn."""
    revoke_grace: float
    """Seconds that lessees have to let go where a stage is dropped by force."""
    trust_peers: bool
    """Whether peers may say what a checkpoint is whose origin does not answer."""


@dataclass(frozen=True)
class CudaLimits:
    """What GPUs are for, and how they are filled."""

    reserve: int
    """Bytes of each GPU that are left to others, engines' contexts among them."""
    fill_path: str
    """``auto``, or ``ring`` to do without libstreamer's CUDA backend."""
