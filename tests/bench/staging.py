"""weightd itself: as its users meet it, and its pipeline alone. Contenders; run in processes of their own."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from tests.bench.measure import Sample, faulted_memfd, timed, warm_cache, warm_memory
from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.checkpoints.contents import open_checkpoint
from weightd.daemon.checkpoints.listing import list_checkpoint
from weightd.daemon.devices.base import Device
from weightd.daemon.devices.cpu import CpuDevice
from weightd.daemon.layouts.checkpoint import checkpoint_layout
from weightd.daemon.layouts.extents import Demands, plan_extents
from weightd.daemon.settings import Settings
from weightd.daemon.sources.uris import Allow, canonical, open_source
from weightd.daemon.stages.loading import Loading
from weightd.daemon.stages.planning import make_plan
from weightd.daemon.stages.request import StageRequest
from weightd.ipc import Client

_RELEASE_DEADLINE = 30.0
"""Seconds that the memory of a dropped stage may take to come back."""


def stage(runtime_dir: str, model: str, nbytes: int, files: list[str], layout: list[str] | None = None) -> Sample:
    """``POST /v1/stage?wait`` on the daemon's Unix socket until the record says ready, then DELETE.

    ``files`` are the checkpoint's, where they are local and to be in the page cache; ``layout`` are the keys of
    uploaded ones. Raises RuntimeError where the
    memory that the stage took does not come back.
    """
    with Client(runtime_directory=runtime_dir) as client:
        client.node()  # the connection is there, as a user's second request finds it
        warm_cache(files)
        warm_memory(nbytes)
        before, huge_before = shared_memory(), shared_memory("ShmemHugePages")
        with timed() as sample:
            record = client.stage(model, wait=3600, **({"layout": {"key": layout}} if layout else {}))
        if record["state"] != "ready":
            raise RuntimeError(f"the stage is {record['state']}: {record['error']}")
        held, huge = shared_memory() - before, shared_memory("ShmemHugePages") - huge_before
        with timed() as removal:
            client.remove(record["id"])
        end = time.monotonic() + _RELEASE_DEADLINE
        while shared_memory() - before > held // 10:
            if time.monotonic() > end:
                raise RuntimeError(f"of {held} bytes, {shared_memory() - before} were not released by DELETE")
            time.sleep(0.01)
    return {
        **sample,
        "nbytes": record["bytes_total"],
        "peer_bytes": record["bytes_by_source"]["peer"],
        "record_seconds": record["ready_at"] - record["created_at"],
        "state_seconds": record["state_seconds"],
        "phase_seconds": record["phase_seconds"],
        "segment_bytes": sum(segment["nbytes"] for segment in record["segments"]),
        "delete_seconds": removal["seconds"],
        "checkpoint_digest": record["checkpoint_digest"],
        "held": held,
        "huge_pages": huge,
    }


def shared_memory(field: str = "Shmem") -> int:
    """Bytes of shared memory on this machine; with ``ShmemHugePages`` those in huge pages."""
    with open("/proc/meminfo") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":")), 0)


class FaultedSegment:
    """Memory with all its pages there already, as a segment: what the pipeline alone is measured into."""

    handle = "fd"
    writable = True
    buffered = False

    def __init__(self, device: Device, nbytes: int) -> None:
        self.device = device
        self.nbytes = nbytes
        self.fd, self._map = faulted_memfd(nbytes)
        self.footprint = len(self._map)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def lend(self) -> int:
        raise NotImplementedError("nobody borrows the benchmark's own memory")

    def write(self, offset: int, data: memoryview) -> None:
        os.pwrite(self.fd, data, offset)

    def read_into(self, offset: int, target: memoryview) -> None:
        target[:] = self.view[offset : offset + len(target)]

    def seal(self) -> None:
        """Nothing to do: it is used again."""

    def close(self) -> None:
        self.view.release()
        self._map.close()


def pipeline(model: str, cache_dir: str, files: list[str]) -> Sample:
    """Listing, planning, reading and digests, into memory that is faulted already; no daemon, no HTTP."""
    limits = Settings().fill_limits
    cache = Cache(Path(cache_dir))
    request = StageRequest(model=model)
    uri = canonical(model)
    source = open_source(uri, Allow())
    host = CpuDevice("cpu", 0)
    segment = FaultedSegment(host, make_plan(source, list_checkpoint(uri, source), request, cache).recipes[0].nbytes)
    warm_cache(files)
    with timed() as sample:
        source = open_source(uri, Allow())
        plan = make_plan(source, list_checkpoint(uri, source), request, cache)
        loading = Loading(source, plan, request, [host], cache, limits)
        loading.lay_out()
        fill = loading.prepare([segment], loading.ledger(), lambda segment, entries: None)
        planned = time.perf_counter()
        loading.run(lambda: None)
        loading.close()
        done = time.perf_counter()
    return {
        **sample,
        "nbytes": loading.bytes_total,
        "read_seconds": done - planned,
        "phase_seconds": dict(fill.seconds),
        "checkpoint_digest": loading.checkpoint_digest,
    }


def plan(model: str) -> Sample:
    """Everything before a byte is allocated, of a checkpoint on local disk: listing, headers, layout, extents."""
    uri = canonical(model)
    limits = Settings().fill_limits
    steps: dict[str, float] = {}
    with timed() as sample:
        last = time.perf_counter()

        def step(name: str) -> None:
            nonlocal last
            now = time.perf_counter()
            steps[name], last = now - last, now

        source = open_source(uri, Allow())
        listing = list_checkpoint(uri, source)
        step("list_checkpoint")
        checkpoint = open_checkpoint(source, listing)
        step("open_checkpoint")
        recipes = checkpoint_layout(checkpoint.tensors)
        step("checkpoint_layout")
        demands = Demands(limits.extent_bytes, source.max_runs, source.min_range)
        extents = plan_extents(checkpoint.tensors, recipes, demands)
        step("plan_extents")
    counts = {"tensors": len(checkpoint.tensors), "shards": len(listing.weights), "extents": len(extents)}
    return {**sample, "steps": steps, **counts}
