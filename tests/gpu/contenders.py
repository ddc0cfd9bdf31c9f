"""What ``make gpu-bench`` times, each in a fresh process: ``fresh("stage", ...)`` runs the function of that name here.

Imports, contexts, the warming of the page cache and a first small load come before the clock starts, for everybody.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.bench.contender import ROOT, TIMEOUT, ContenderFailed, die_with_parent
from tests.bench.measure import Sample, cores, timed, warm_cache, warm_memory

CUDA = "cuda:0"
_CHUNK = 8 << 20
_PORTABLE = 0x1  # CU_MEMHOSTALLOC_PORTABLE
_NON_BLOCKING = 0x1  # CU_STREAM_NON_BLOCKING


def fresh(function: str, *, environment: Mapping[str, str] | None = None, **arguments: Any) -> Sample:
    """Run a function of this module in a process of its own. Raises ContenderFailed."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.gpu.contenders", function, json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        preexec_fn=die_with_parent,
    )
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        tail = " ".join((process.stderr or process.stdout).strip().splitlines()[-1:])
        raise ContenderFailed(f"{function} ended with {process.returncode}: {tail}")
    sample: Sample = json.loads(lines[-1])
    return sample


def later(function: str, **arguments: Any) -> Callable[[], Sample]:
    """``fresh``, to be called when its turn comes."""
    return partial(fresh, function, **arguments)


# ---------------------------------------------------------------------- the machine


def facts() -> dict[str, str]:
    """The GPU, its driver, and the versions of what uses it."""
    from weightd.ipc.cuda import call, gpus

    gpu = gpus()[0]
    version = call("cuDriverGetVersion")
    found = {
        "GPU": f"{gpu.name}, {gpu.total_bytes / 2**30:.0f} GiB",
        "GPUs": str(len(gpus())),
        "CUDA of the driver": f"{version // 1000}.{version % 1000 // 10}",
    }
    try:
        asked = [
            "nvidia-smi",
            "--query-gpu=driver_version,pcie.link.gen.max,pcie.link.width.max",
            "--format=csv,noheader",
        ]
        text = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False).stdout
        names = ("driver", "PCIe generation", "PCIe lanes")
        found |= dict(zip(names, (part.strip() for part in text.splitlines()[0].split(",")), strict=True))
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired):
        pass  # a container need not have it
    for package in ("cuda-bindings", "cupy-cuda12x", "cupy-cuda13x"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def _pinned(nbytes: int) -> Iterator[int]:
    """Pinned host memory beside the GPU, every page of it touched."""
    from weightd.daemon.devices.pinned import cpus_near
    from weightd.ipc.cuda import call, gpus

    if near := cpus_near(gpus()[0]):
        os.sched_setaffinity(0, near)
    address = call("cuMemHostAlloc", nbytes, _PORTABLE)
    try:
        ctypes.memset(int(address), 1, nbytes)
        yield int(address)
    finally:
        call("cuMemFreeHost", address)


def pinned_copies(nbytes: int, direction: str, tries: int = 3) -> Sample:
    """The limit: pinned memory ↔ GPU and nothing else, in one copy, on several streams, in chunks; the best of all."""
    from weightd.ipc.cuda import call, gpus

    gpu = gpus()[0]
    runs: dict[str, list[float]] = {}
    with gpu.context():
        streams = [call("cuStreamCreate", _NON_BLOCKING) for _ in range(4)]
        there = int(call("cuMemAlloc", nbytes))
        with _pinned(nbytes) as here:

            def copy(stream: Any, offset: int, length: int) -> None:
                if direction == "to the GPU":
                    call("cuMemcpyHtoDAsync", there + offset, here + offset, length, stream)
                else:
                    call("cuMemcpyDtoHAsync", here + offset, there + offset, length, stream)

            def run(count: int, chunk: int) -> float:
                start = time.perf_counter()
                for number, offset in enumerate(range(0, nbytes, chunk)):
                    copy(streams[number % count], offset, min(chunk, nbytes - offset))
                for stream in streams[:count]:
                    call("cuStreamSynchronize", stream)
                return time.perf_counter() - start

            ways = {
                "one copy": (1, nbytes),
                "2 streams, a copy each": (2, -(-nbytes // 2)),
                "4 streams, a copy each": (4, -(-nbytes // 4)),
                "1 stream, 8 MiB a copy": (1, _CHUNK),
                "4 streams, 8 MiB a copy": (4, _CHUNK),
            }
            run(4, _CHUNK)  # the first copies wake the link up
            for _ in range(tries):
                for name, way in ways.items():
                    runs.setdefault(name, []).append(run(*way))
    best = min(runs, key=lambda name: min(runs[name]))
    return {"seconds": min(runs[best]), "nbytes": nbytes, "named": best, "runs": runs}


def digests(nbytes: int, lot: int) -> Sample:
    """Leaf digests of memory on the GPU, ``lot`` leaves a call; by the wall clock, results on the host included."""
    import cupy

    from weightd.daemon.devices.gpu_digests import GpuDigests
    from weightd.daemon.layouts.digests import LEAF
    from weightd.ipc.cuda import gpus

    gpu = gpus()[0]
    free, _ = gpu.memory()
    leaves = min(nbytes, free * 3 // 4) // LEAF
    found = GpuDigests(gpu)
    with cupy.cuda.Device(0):
        data = cupy.arange(LEAF // 8 * leaves, dtype=cupy.uint64)
        data *= cupy.uint64(0x9E37_79B9_7F4A_7C15)
        cupy.cuda.get_current_stream().synchronize()
        ranges = [(int(data.data.ptr) + LEAF * leaf, LEAF) for leaf in range(leaves)]
        lots = [ranges[first : first + lot] for first in range(0, leaves, lot)]
        first = [list(found.leaves(part)) for part in lots]
        with timed() as sample:
            again = [list(found.leaves(part)) for part in lots]
    if again != first:
        raise RuntimeError("the same bytes have two digests")
    return {**sample, "nbytes": leaves * LEAF, "calls": len(lots)}


# ---------------------------------------------------------------------- weightd


def stage(runtime_dir: str, model: str, files: list[str], device: str, nbytes: int = 0) -> Sample:
    """``POST /v1/stage?wait`` on the Unix socket until ready, then DELETE. ``nbytes``: host memory to warm before."""
    from weightd.ipc import Client

    with Client(runtime_directory=runtime_dir) as client:
        client.node()
        warm_cache(files)
        if nbytes:
            warm_memory(nbytes)
        with timed() as sample:
            record = client.stage(model, wait=3600, device=device)
        if record["state"] != "ready":
            raise RuntimeError(f"the stage is {record['state']}: {record['error']}")
        client.remove(record["id"])
    return {
        **sample,
        "nbytes": record["bytes_total"],
        "record_seconds": record["ready_at"] - record["created_at"],
        "state_seconds": record["state_seconds"],
        "phase_seconds": record["phase_seconds"],
        "checkpoint_digest": record["checkpoint_digest"],
    }


def attach(runtime_dir: str, stage: str, make: bool) -> Sample:
    """``attach()`` in a process that has a context, as an engine has; with ``make``, then every tensor as torch's."""
    from weightd.ipc import attach as attach_weights
    from weightd.ipc.cuda import gpus

    if make:
        import torch

        torch.zeros(1, device=CUDA)
    gpus()[0].memory()
    with timed() as sample:
        weights = attach_weights(stage=stage, socket=runtime_dir)
    sample["tensors"] = len(weights)
    if make:
        with timed() as making:
            tensors = [weights[name] for name in weights]
        sample["together_seconds"] = sample["seconds"] + making["seconds"]
        sample["made"] = len(tensors)
    return sample


# ---------------------------------------------------------------------- rivals


def _rival(load: Callable[[list[str]], dict[str, Any]], primer: str, files: list[str]) -> Sample:
    import torch

    warm_cache(files)
    load([primer])
    torch.cuda.synchronize()
    with timed() as sample:
        tensors = load(files)
        torch.cuda.synchronize()
    wanted = sum(os.path.getsize(name) for name in files)
    found = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values() if tensor.is_cuda)
    if not 0.99 * wanted <= found <= wanted:
        raise RuntimeError(f"{found} bytes of tensors are on the GPU, from files of {wanted} bytes")
    return {**sample, "nbytes": found, "tensors": len(tensors)}


def load_file(primer: str, files: list[str]) -> Sample:
    """``safetensors.torch.load_file(device="cuda")``."""
    from safetensors.torch import load_file as load

    return _rival(lambda names: {k: v for name in names for k, v in load(name, device=CUDA).items()}, primer, files)


def fastsafetensors(primer: str, files: list[str], threads: int | None) -> Sample:
    """``SafeTensorsFileLoader``: as it comes, or without GPUDirect Storage and with so many threads."""
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    options: dict[str, Any] = {} if threads is None else {"max_threads": threads, "nogds": True}
    kept = []

    def load(names: list[str]) -> dict[str, Any]:
        loader = SafeTensorsFileLoader(SingleGroup(), CUDA, **options)
        loader.add_filenames({0: names})
        buffers = loader.copy_files_to_device()
        kept.append((loader, buffers))
        return {name: buffers.get_tensor(name) for name in loader.get_keys()}

    return _rival(load, primer, files)


def runai(primer: str, files: list[str]) -> Sample:
    """``SafetensorsStreamer`` to the GPU, every tensor kept. Configured by environment."""
    from runai_model_streamer import SafetensorsStreamer

    def load(names: list[str]) -> dict[str, Any]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(names, device=CUDA)
            return dict(streamer.get_tensors())

    return _rival(load, primer, files)


def main() -> None:
    function: Callable[..., Any] = globals()[sys.argv[1]]
    sample = function(**json.loads(sys.argv[2]))
    print("\n" + json.dumps(sample), flush=True)
    sys.stderr.flush()
    os._exit(0)


def rivals(primer: Path, files: list[str]) -> dict[str, Callable[[], Sample]]:
    """Name → measurement of everybody whose package is installed, as it comes and with a thread for each core."""
    given = {"primer": str(primer), "files": files}
    found = {"safetensors load_file(device='cuda')": later("load_file", **given)}
    if _installed("fastsafetensors"):
        found["fastsafetensors, as it comes"] = later("fastsafetensors", threads=None, **given)
        found[f"fastsafetensors, nogds, {cores()} threads"] = later("fastsafetensors", threads=cores(), **given)
    if _installed("runai-model-streamer"):
        tuned = {"RUNAI_STREAMER_CONCURRENCY": str(cores())}
        found["SafetensorsStreamer, as it comes"] = later("runai", **given)
        found[f"SafetensorsStreamer, concurrency {cores()}"] = later("runai", environment=tuned, **given)
    return found


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
