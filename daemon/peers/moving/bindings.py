"""NIXL's bindings: which of its builds is the one for this machine, and how it is loaded."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
from importlib.machinery import PathFinder
from types import ModuleType

_BUILDS = {13: "nixl_cu13", 12: "nixl_cu12"}
"""Packages by the major version of CUDA that they are built for."""

_NEEDED = ("nixlAgent", "nixlAgentConfig", "nixlRegDList", "nixlXferDList", "nixlRemoteDisconnectError")

_ENVIRONMENT = {
    "UCX_TCP_TX_SEG_SIZE": "64k",  # 8 KiB by default, at half the speed
    "UCX_TCP_RX_SEG_SIZE": "64k",
    "UCX_HANDLE_ERRORS": "none",  # no handlers for SIGSEGV and the like, which dump and may wait for a debugger
    "UCX_DEBUG_SIGNO": "0",  # else UCX takes SIGHUP for itself
    # Hooks below every munmap, whose making takes 0.4 s of CPU time, serve a cache of registrations that is of no use
    # here: a region is registered once, and deregistered before it is unmapped.
    "UCX_MEM_EVENTS": "no",
    "UCX_RCACHE_ENABLE": "no",
}
"""Settings of UCX, where whoever runs the daemon has not chosen."""

_loading = threading.Lock()


class NixlUnavailable(RuntimeError):
    """NIXL is not installed, not the build for this driver, or does not work here; the message says what to do."""


def _driver_major() -> int | None:
    """The major version of CUDA that the driver is for; None without a driver. Starts nothing on a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000


def _choose() -> str:
    """The package to load: of those installed, the newest that the driver is good for."""
    loaded = [name for name in _BUILDS.values() if name in sys.modules or f"{name}._bindings" in sys.modules]
    if loaded:  # both in one process clash: two copies of UCX, two of every C++ type
        return loaded[0]
    installed = {major: name for major, name in _BUILDS.items() if importlib.util.find_spec(name) is not None}
    driver = _driver_major()
    if not installed:
        wanted = _BUILDS[12 if driver == 12 else 13]
        raise NixlUnavailable(f"NIXL is not installed: pip install --no-deps {wanted}")
    for major, name in installed.items():
        if driver is None or major <= driver:
            return name
    raise NixlUnavailable(
        f"{', '.join(installed.values())} is built for a newer CUDA than the driver's ({driver}): "
        f"pip install --no-deps {_BUILDS[12]}"
    )


def load() -> ModuleType:
    """NIXL's bindings, loaded once per process: 70 ms, 40 MiB. Raises NixlUnavailable.

    The extension alone: importing the package would also import numpy, close the log handlers that there are, set
    ``logging.raiseExceptions`` to False, and log to stdout; and its ``nixl_agent`` sets the progress thread's pause to
    0, by which an idle agent takes a whole core.
    """
    with _loading:
        package = _choose()
        name = f"{package}._bindings"
        if name in sys.modules:
            return sys.modules[name]
        parent = importlib.util.find_spec(package)
        spec = PathFinder.find_spec(name, parent.submodule_search_locations) if parent else None
        if spec is None or spec.loader is None:
            raise NixlUnavailable(f"{package} has no bindings for Python {sys.version.split()[0]}: install its wheel")
        for variable, value in _ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except (ImportError, OSError) as error:
            raise NixlUnavailable(f"{package} cannot be loaded ({error}): reinstall it") from None
        lacking = [attribute for attribute in _NEEDED if not hasattr(module, attribute)]
        if lacking:
            raise NixlUnavailable(f"{package} is not of the version that weightd knows, 1.5: no {', '.join(lacking)}")
        sys.modules[name] = module
        return module
