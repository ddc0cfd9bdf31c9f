"""What this daemon is made of: versions of weightd and of what moves its bytes."""

from __future__ import annotations

import platform
from importlib import metadata

_PACKAGES = {
    "version": ("weightd",),
    "streamer": ("runai-model-streamer",),
    "obstore": ("obstore",),
    "nixl": ("nixl-cu13", "nixl-cu12", "nixl"),
    "cuda_bindings": ("cuda-bindings",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
}
"""Label → names that the package may be installed by, the first one that is counts."""


def build_info() -> dict[str, str]:
    """Versions by label of ``weightd_build_info``; empty where something is not installed."""
    found = {label: next(filter(None, map(version, names)), "") for label, names in _PACKAGES.items()}
    return {**found, "python": platform.python_version()}


def version(package: str) -> str | None:
    """An installed package's version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
