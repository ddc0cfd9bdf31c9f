"""All metrics there are: their names, types, labels, and what they say. docs/metrics.md is made from this."""

from __future__ import annotations

from typing import Literal, NamedTuple

from weightd.daemon.observing.clock import STAGE_PHASES

STAGE_STATES = ("queued", "planning", "loading", "verifying", "ready", "failed", "cancelled", "evicted")
SOURCES = ("file", "s3", "gs", "az", "hf", "resident", "peer")
EVICTED = ("capacity", "ttl", "request", "revoked")
TRANSPORTS = ("rdma", "cuda_ipc", "shm", "tcp", "unknown")
BETTER_PATHS = ("rdma", "shm", "cuda_ipc")
DROPPED = ("stalled", "gone", "failed", "unreachable", "wrong_bytes", "nonsense", "version")
ENDS = ("crashed", "killed", "out_of_memory", "replaced")
ADOPTED = ("ready", "interrupted", "failed")
LISTENERS = ("api", "api.sock", "lease.sock", "health", "metrics", "peers", "s3")
S3_OUTCOMES = {
    "resident": "from memory, or the cache of configuration files",
    "waited": "from memory, once they had been loaded",
    "passed": "from the origin, and not kept",
}
S3_OPERATIONS = (
    "GetObject",
    "HeadObject",
    "ListObjects",
    "ListBuckets",
    "HeadBucket",
    "GetBucketLocation",
    "other",
)
REFUSED = {
    "silent": "it had not said in time what it wants",
    "room": "it said nothing, and others needed its place",
    "full": "all places were taken",
    "not_admitted": "its user may not use this socket",
}
"""Why a connection is dropped, or not let in, in words."""
AGES = {"<1m": 60.0, "<1h": 3600.0, "<1d": 86400.0, ">=1d": float("inf")}
"""Age → seconds below which a lease has it, the first one that fits."""

MAX_MODELS = 20
"""Models with series of their own, where there may be any number."""
MAX_PEERS = 50
"""Peers with series of their own."""


class Family(NamedTuple):
    """One metric: ``labels`` are keys of ``LABELS``, ``buckets`` the upper bounds of a histogram."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_SHORT = (0.0005, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_LONG = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
_REQUEST = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

SECTIONS: dict[str, tuple[Family, ...]] = {
    "Stages": (
        Family("weightd_stages", "gauge", "Stages known, by state; of those that have ended the latest.", ("state",)),
        Family("weightd_queue_oldest_seconds", "gauge", "Seconds that the stage has waited which waits longest for "
               "its turn; 0 where none waits."),
        Family("weightd_preload_entries", "gauge", "Entries of the preload list."),
        Family("weightd_preload_missing", "gauge", "Entries of the preload list that were not ready since the daemon "
               "started; a list that cannot be read is one."),
        Family("weightd_stage_duration_seconds", "histogram", "Seconds from request to ready.", ("source",), _LONG),
        Family("weightd_stage_wall_seconds_total", "counter", "Seconds of stages by where they went, from the request "
               "until ready or the end: of each stage they add up to its duration.", ("phase", "source")),
        Family("weightd_stage_phase_seconds_total", "counter", "Thread-seconds of loading by what threads were at; "
               "threads that work side by side count each.", ("source", "phase")),
        Family("weightd_stages_finished_total", "counter", "Stages that ended, by state.", ("state",)),
        Family("weightd_errors_total", "counter", "Failed stages and refused requests, by code of the error.",
               ("code",)),
        Family("weightd_digest_mismatches_total", "counter", "Times that bytes were not the expected ones, by where "
               "they came from. They were dropped.", ("source",)),
        Family("weightd_stages_restaged_total", "counter", "Stages of what was evicted for lack of room within the "
               "hour before."),
    ),
    "The latest stage of a model": (
        Family("weightd_latest_stage_seconds", "gauge", "Seconds by where they went, of the latest stage of a model "
               "on a device; so far, where it is on its way.", ("model", "device", "phase", "source")),
        Family("weightd_latest_stage_bytes", "gauge", "Bytes that are there and hashed, by where they came from, of "
               "the latest stage of a model on a device.", ("model", "device", "source")),
        Family("weightd_latest_stage_size_bytes", "gauge", "Bytes to read, of the latest stage of a model on a device; "
               "0 until that is known.", ("model", "device")),
        Family("weightd_latest_stage_state", "gauge", "State of the latest stage of a model on a device: always 1, the "
               "label says it.", ("model", "device", "state")),
        Family("weightd_latest_stage_created_timestamp_seconds", "gauge", "When the latest stage of a model on "
               "a device was asked for, in seconds since the epoch.", ("model", "device")),
        Family("weightd_latest_ready_seconds", "gauge", "Seconds from request to ready, of the latest stage of a model "
               "on a device that became ready.", ("model", "device")),
    ),
    "Sources": (
        Family("weightd_source_read_bytes_total", "counter", "Bytes of weights read, by source.", ("source",)),
        Family("weightd_source_retries_total", "counter", "Reads that failed and were tried again.", ("source",)),
    ),
    "Residency": (
        Family("weightd_capacity_bytes", "gauge", "Bytes that segments may take.", ("device",)),
        Family("weightd_used_bytes", "gauge", "Bytes that segments take or are promised, orphans included.",
               ("device",)),
        Family("weightd_evictable_bytes", "gauge", "Of the used bytes those that go where room is needed: ready, not "
               "leased, not pinned.", ("device",)),
        Family("weightd_free_bytes", "gauge", "Bytes that are left for segments; of a GPU never more than others "
               "leave.", ("device",)),
        Family("weightd_resident_bytes", "gauge", "Bytes of device memory that segments take or are promised, by "
               "model.", ("device", "model")),
        Family("weightd_evictions_total", "counter", "Ready stages that were freed, by reason.", ("reason",)),
        Family("weightd_device_paths_info", "gauge", "How a GPU is filled (streamer: libstreamer's CUDA backend, ring: "
               "pinned bounce buffers), and where digests of its memory are computed; always 1.",
               ("device", "fill", "digests")),
    ),
    "Leases": (
        Family("weightd_leases", "gauge", "Leases held."),
        Family("weightd_leases_by_age", "gauge", "Leases held, by their age.", ("age",)),
        Family("weightd_lease_oldest_seconds", "gauge", "Age of the oldest lease; 0 where there is none."),
        Family("weightd_leases_awaited", "gauge", "Leases of before the daemon's restart whose holders may still come "
               "back."),
        Family("weightd_attach_duration_seconds", "histogram", "Seconds from a lease request for a ready stage to its "
               "handle being sent.", (), _SHORT),
    ),
    "Keeper and restarts": (
        Family("weightd_keeper_up", "gauge", "1 where a keeper holds what is resident, so that it outlives the daemon; "
               "else 0."),
        Family("weightd_keeper_daemon_ends_total", "counter", "Daemons before this one of the same keeper, by how they "
               "ended.", ("how",)),
        Family("weightd_keeper_orphans", "gauge", "Stages that the keeper holds and this version of weightd does not "
               "understand."),
        Family("weightd_keeper_orphaned_bytes", "gauge", "Bytes of host memory that those stages take which the keeper "
               "holds and this version of weightd does not understand."),
        Family("weightd_device_quarantined", "gauge", "1 where a GPU ended daemons and is left alone, with what it "
               "holds, until weightd reload; else 0.", ("device",)),
        Family("weightd_start_duration_seconds", "gauge", "Seconds from the start of this daemon's process until it "
               "served, with everything adopted."),
        Family("weightd_stages_adopted_total", "counter", "Stages taken over from the daemon before, by what they "
               "were.", ("state",)),
        Family("weightd_adopted_bytes_total", "counter", "Bytes of stages taken over from the daemon before."),
    ),
    "Peers": (
        Family("weightd_peers", "gauge", "Other daemons in the directory."),
        Family("weightd_peers_off", "gauge", "1 where peers are configured and nothing can be read from them, nor they "
               "from this daemon; else 0."),
        Family("weightd_peer_readers", "gauge", "Stages that peers are reading from this daemon."),
        Family("weightd_peer_read_bytes_total", "counter", "Bytes of weights read from peers, and verified.",
               ("peer", "transport")),
        Family("weightd_peer_sent_bytes_total", "counter", "Bytes that peers say they have read from this daemon.",
               ("peer",)),
        Family("weightd_origin_saved_bytes_total", "counter", "Bytes that were not read from an origin because peers "
               "had them."),
        Family("weightd_peers_dropped_total", "counter", "Peers given up while a stage was read from them.",
               ("peer", "reason")),
        Family("weightd_peer_slow_path_total", "counter", "Stages that read from a peer by TCP though this machine has "
               "a better path to it.", ("better",)),
    ),
    "API": (
        Family("weightd_api_request_duration_seconds", "histogram", "Seconds to answer an HTTP request (to the first "
               "byte of an event stream).", ("method", "route", "status"), _REQUEST),
        Family("weightd_connections", "gauge", "Connections that are open, by the socket that they came in by.",
               ("listener",)),
        Family("weightd_connections_dropped_total", "counter", "Connections that were hung up on or turned away, by "
               "the socket that they came to.", ("listener", "reason")),
    ),
    "S3 endpoint": (
        Family("weightd_s3_requests_total", "counter", "Requests to the S3 endpoint that were answered.",
               ("operation", "status")),
        Family("weightd_s3_sent_bytes_total", "counter", "Bytes of objects that the S3 endpoint has sent, by where "
               "they came from.", ("outcome",)),
    ),
    "Build": (
        Family("weightd_build_info", "gauge", "Versions of weightd and of what moves its bytes; always 1.",
               ("version", "python", "streamer", "obstore", "nixl", "cuda_bindings", "cupy")),
    ),
}  # fmt: skip

FAMILIES = {family.name: family for families in SECTIONS.values() for family in families}

PROCESS = {
    "process_resident_memory_bytes": "Memory of the daemon's process, resident segments in host memory included.",
    "process_virtual_memory_bytes": "Its address space.",
    "process_cpu_seconds_total": "Processor time that it has used.",
    "process_open_fds": "Descriptors that it has open.",
    "process_max_fds": "Descriptors that it may have open.",
    "process_start_time_seconds": "When it started, in seconds since the epoch.",
}
"""What prometheus_client adds of the process."""


def _of(values: tuple[str, ...] | dict[str, object]) -> str:
    return ", ".join(f"`{value}`" for value in values)


LABELS = {
    "state": _of(STAGE_STATES),
    "weightd_stages_finished_total.state": "`ready`, `failed`, `cancelled`",
    "source": f"where bytes come from: {_of(SOURCES)}",
    "phase": "; ".join(f"`{phase}`: {text}" for phase, text in STAGE_PHASES.items()),
    "code": "the error's code, as in the API (below)",
    "device": "a device of the node, or several with commas between",
    "model": f"the checkpoint's URI, without query and user, at most 120 characters. Of what is resident, the "
    f"{MAX_MODELS} largest on each device have series of their own, all others together are `other`. Of latest stages "
    f"those on their way and then the youngest are there, {MAX_MODELS} at most",
    "reason": _of(EVICTED),
    "weightd_peers_dropped_total.reason": _of(DROPPED),
    "weightd_connections_dropped_total.reason": "; ".join(f"`{reason}`: {text}" for reason, text in REFUSED.items()),
    "listener": f"{_of(LISTENERS)}; `api` is the TCP port of the API, `peers` the one for peers",
    "operation": f"{_of(S3_OPERATIONS)}: what is refused as such",
    "outcome": "; ".join(f"`{outcome}`: {text}" for outcome, text in S3_OUTCOMES.items()),
    "fill": "`streamer`, `ring`",
    "digests": "`gpu`, `host`",
    "age": _of(tuple(AGES)),
    "how": "`crashed`: by itself; `killed`: by SIGKILL; `out_of_memory`: by the kernel's SIGKILL, where its control "
    "group counted an `oom_kill`; `replaced`: by `weightd reload`",
    "weightd_stages_adopted_total.state": _of(ADOPTED),
    "peer": f"HOST:PORT; the first {MAX_PEERS} that were met have series of their own, all others are `other`",
    "transport": _of(TRANSPORTS),
    "better": _of(BETTER_PATHS),
    "method": "the HTTP method; `other` where it is none of the API's",
    "route": "the route's template; `unmatched` where there is none",
    "status": "the HTTP status",
    "version": "of weightd",
    "python": "of Python",
    "streamer": "of runai-model-streamer",
    "obstore": "of obstore",
    "nixl": "of NIXL; empty where it is not installed",
    "cuda_bindings": "of cuda-bindings; empty where it is not installed",
    "cupy": "of CuPy; empty where it is not installed",
}
"""Label → its values; ```family.label`` where they are others there."""
