"""Settings: a flag of ``weightd serve``, else a ``WEIGHTD_*`` variable of the same name, else a default."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, FilePath, SecretStr, TypeAdapter, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from weightd.daemon.addresses import is_loopback, join_address, parse_address, parse_listen
from weightd.daemon.errors import InvalidRequest
from weightd.daemon.layouts.digests import LEAF
from weightd.daemon.limits import CudaLimits, FillLimits, NodeLimits
from weightd.daemon.peers.finding.directory import parse as parse_directory
from weightd.daemon.sources.uris import Allow
from weightd.ipc.runtime_dir import runtime_dir

_SIZE: TypeAdapter[ByteSize] = TypeAdapter(ByteSize)


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weightd"


def _own_gids() -> list[int]:
    return sorted({os.getegid(), *os.getgroups()})


class Settings(BaseSettings):
    """Everything that can be set. Sizes take units (8GiB), lists are comma-separated."""

    model_config = SettingsConfigDict(env_prefix="WEIGHTD_", extra="forbid")

    runtime_dir: Path = Field(
        default_factory=runtime_dir, description="Folder of the two sockets, api.sock and lease.sock."
    )
    listen: str = Field(
        "127.0.0.1:7400", description="HOST:PORT of the HTTP API beside api.sock; empty for none (--no-listen)."
    )
    health_listen: str = Field(
        "", description="HOST:PORT that answers /livez, /readyz and /healthz, to whoever asks; empty: none."
    )
    metrics_listen: str = Field("", description="HOST:PORT that answers /metrics, to whoever asks; empty: none.")
    s3_listen: str = Field(
        "", description="HOST:PORT of an S3 endpoint, from which whatever reads s3:// gets what is resident; empty: "
        "none. Beyond loopback only with keys.",
    )  # fmt: skip
    s3_access_key: str = Field("", description="Access key that requests to the S3 endpoint must be signed with.")
    s3_secret_key: SecretStr | None = Field(None, description="Its secret key.")
    s3_absent: Literal["stage", "pass", "refuse"] = Field(
        "stage",
        description="What the S3 endpoint does with weights that are not resident: stage them, pass them on from their "
        "origin and keep nothing, or refuse.",
    )
    s3_device: str = Field("cpu", description="Device that it stages to; from a GPU bytes have to be copied back.")
    preload: str = Field(
        "",
        description="What to stage at start: a JSON array of stage requests, or the path of a file with one. /readyz "
        "answers 503 until each was ready once.",
    )
    allow: Annotated[list[str], NoDecode] = Field(
        default_factory=list, description="URI prefixes of what may be staged; empty: everything the daemon can read."
    )
    capacity: Annotated[dict[str, ByteSize], NoDecode] = Field(
        default_factory=dict, description="Bytes of a device that segments may take, as in cpu=8GiB; default: half of "
        "the memory that is available at start.",
    )  # fmt: skip
    cache_dir: Path = Field(
        default_factory=_cache_dir, description="Folder of fetched configuration files and known digests."
    )
    cache_bytes: ByteSize = Field(
        ByteSize(4 << 30), ge=0,
        description="Bytes kept in it, least recently used go first; what is of resident stages stays in any case.",
    )  # fmt: skip
    token: SecretStr | None = Field(
        None,
        description="Bearer token that the TCP API demands, needed beyond loopback; empty: reading, and staging what "
        "fits, take none, all else the one in the file token of the runtime directory.",
    )
    peer_uids: Annotated[list[int], NoDecode] = Field(
        default_factory=lambda: sorted({0, os.geteuid()}), description="Users, by number, that may use the sockets."
    )
    peer_gids: Annotated[list[int], NoDecode] = Field(
        default_factory=_own_gids, description="Groups, by number, that may use the sockets; default: the daemon's own."
    )
    concurrent_loads: int = Field(
        2, ge=1, le=64,
        description="Stages that load at the same time, for each kind of source and device; others queue.",
    )  # fmt: skip
    max_queued: int = Field(256, ge=1, le=100_000, description="Stages that wait for their turn; more are refused.")
    read_threads: int = Field(
        default_factory=lambda: min(16, max(2, os.cpu_count() or 1)),
        ge=1, le=256, description="Threads that read files, for each stage that loads; default: one a core, 2 to 16.",
    )  # fmt: skip
    in_flight: ByteSize = Field(
        ByteSize(1 << 30),
        ge=1 << 20,
        description="Bytes asked of an object store and not yet here, at most, for each stage: as many as help.",
    )
    extent: ByteSize = Field(
        ByteSize(8 << 20), ge=LEAF, le=1 << 30, description="Bytes of one read, and of a bounce buffer."
    )
    peers: str = Field(
        "none",
        description="Where daemons find each other: none, static:HOST:PORT,..., dns:NAME:PORT or etcd:http://HOST:2379.",
    )
    peer_listen: str = Field(
        "", description="HOST:PORT where peers may read what this daemon has; empty: nowhere. Not the API's port."
    )
    peer_address: str = Field("", description="HOST:PORT where peers reach it; default: peer_listen.")
    peer_token: SecretStr | None = Field(None, description="Bearer token that daemons of one fleet show each other.")
    peer_tls_cert: FilePath | None = Field(
        None, description="PEM file with the certificate by which daemons of one fleet know each other (mutual TLS)."
    )
    peer_tls_key: FilePath | None = Field(None, description="PEM file with its key.")
    peer_tls_ca: FilePath | None = Field(
        None, description="PEM file with the authority of the fleet's certificates: whoever shows one is let in."
    )
    peer_stall: float = Field(
        10.0, gt=0, le=3600, description="Seconds after which a peer that brings nothing is given up."
    )
    peer_grace: float = Field(
        10.0, ge=0, le=3600, description="Seconds that an eviction waits for peers that read what is to go."
    )
    peer_trust: bool = Field(
        False,
        description="Whether peers are believed what a checkpoint is, and that its bytes are its own, where the origin "
        "does not answer.",
    )
    cuda_reserve: ByteSize = Field(
        ByteSize(1 << 30), ge=0, description="Bytes of each GPU that segments leave to others, whatever the capacity."
    )
    cuda_fill: Literal["auto", "ring"] = Field(
        "auto",
        description="How GPUs are filled: auto takes libstreamer's own CUDA backend where it passes its self-test, "
        "ring always our pinned bounce buffers.",
    )
    host_fill: Literal["auto", "buffered", "direct"] = Field(
        "auto",
        description="How host memory is filled: direct reads files to where their bytes belong, buffered by way of "
        "bounce buffers; auto takes direct where shared memory may use huge pages.",
    )
    bounce_buffers: int = Field(16, ge=2, le=1024, description="Bounce buffers at most, for each stage that loads.")
    retry_deadline: float = Field(
        120.0,
        ge=0,
        le=86400,
        description="Seconds after which a failing read or a stalled source is given up.",
    )
    max_leases: int = Field(1024, ge=1, le=1_000_000, description="Lease connections at most.")
    max_leases_per_user: int = Field(1024, ge=1, le=1_000_000, description="Leases that one user may hold.")
    lease_grace: float = Field(
        30.0, ge=0, le=86400,
        description="Seconds that lessees have to come back after a restart of the daemon, before their stage may go.",
    )  # fmt: skip
    revoke_grace: float = Field(
        30.0, ge=0, le=86400, description="Seconds that lessees have to let go where their stage is dropped by force."
    )
    on_stop: Literal["drop", "refuse"] = Field(
        "drop",
        description="What an ordered stop (SIGTERM, Ctrl-C) does: drop the weights, or refuse while any are leased.",
    )
    restart_limit: int = Field(
        10, ge=0, description="Deaths of the daemon within restart_window after which it stays down; 0: never."
    )
    restart_window: float = Field(60.0, gt=0, description="Seconds over which deaths of the daemon are counted.")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="Of the log on stderr: json, text, or auto, which is text on a terminal and JSON elsewhere."
    )
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error.")

    @field_validator("allow", "peer_uids", "peer_gids", mode="before")
    @classmethod
    def _comma_separated(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("capacity", mode="before")
    @classmethod
    def _device_sizes(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part for part in value.split(",") if part.strip()]
        if isinstance(value, list):
            pairs = [part.strip().partition("=") for part in value]
            for device, separator, _ in pairs:
                if not separator or not device:
                    raise ValueError(f"expected DEVICE=SIZE, as in cpu=8GiB, found {device!r}")
            return {device: _SIZE.validate_python(size) for device, _, size in pairs}
        return value

    @field_validator("allow")
    @classmethod
    def _uri_prefixes(cls, value: list[str]) -> list[str]:
        try:
            return list(Allow(value).prefixes)
        except InvalidRequest as error:
            raise ValueError(str(error).removeprefix("model: ")) from None

    @field_validator("peers")
    @classmethod
    def _directory(cls, value: str) -> str:
        parse_directory(value)
        return value

    @field_validator("listen", "peer_listen", "health_listen", "metrics_listen", "s3_listen")
    @classmethod
    def _as_written(cls, value: str) -> str:
        if value:
            parse_listen(value)
        return value

    @field_validator("peer_address")
    @classmethod
    def _one_spelling(cls, value: str) -> str:
        return join_address(*parse_address(value)) if value else value

    @model_validator(mode="after")
    def _ports_of_their_own(self) -> Settings:
        taken: dict[str, str] = {}
        for name in ("listen", "peer_listen", "health_listen", "metrics_listen", "s3_listen"):
            address = getattr(self, name)
            if address and address in taken:
                raise ValueError(f"{taken[address]} and {name} are both {address!r}: each has a port of its own")
            taken[address] = name
        return self

    @model_validator(mode="after")
    def _reachable(self) -> Settings:
        if self.listen and self.token is None and not is_loopback(parse_listen(self.listen)[0]):
            raise ValueError(
                f"listen {self.listen!r} is open to the network: set WEIGHTD_TOKEN, or listen on loopback, as in "
                "127.0.0.1:7400"
            )
        address = self.peer_address or self.peer_listen
        if address and self.peers != "none":
            parse_directory(self.peers)(node=address, address=address)
        files = {name: getattr(self, f"peer_tls_{name}") for name in ("cert", "key", "ca")}
        if missing := [f"WEIGHTD_PEER_TLS_{name.upper()}" for name, file in files.items() if file is None]:
            if len(missing) < len(files):
                raise ValueError(f"mutual TLS takes a certificate, its key and the authority: {missing[0]} is missing")
            if self.peer_listen and self.peer_token is None and not is_loopback(parse_listen(self.peer_listen)[0]):
                raise ValueError(
                    f"peer_listen {self.peer_listen!r} is open to the network: set WEIGHTD_PEER_TOKEN, or "
                    "WEIGHTD_PEER_TLS_CERT, _KEY and _CA"
                )
        return self

    @model_validator(mode="after")
    def _s3_is_guarded(self) -> Settings:
        if bool(self.s3_access_key) != (self.s3_secret_key is not None):
            missing = "WEIGHTD_S3_SECRET_KEY" if self.s3_access_key else "WEIGHTD_S3_ACCESS_KEY"
            raise ValueError(f"the S3 endpoint's keys are two, an access key and its secret: {missing} is missing")
        if self.s3_listen and not self.s3_access_key and not is_loopback(parse_listen(self.s3_listen)[0]):
            raise ValueError(
                f"s3_listen {self.s3_listen!r} is open to the network: set WEIGHTD_S3_ACCESS_KEY and _SECRET_KEY"
            )
        return self

    @field_validator("token", "peer_token", "s3_secret_key")
    @classmethod
    def _no_empty_token(cls, value: SecretStr | None) -> SecretStr | None:
        return value if value and value.get_secret_value() else None

    @field_validator("extent")
    @classmethod
    def _whole_leaves(cls, value: ByteSize) -> ByteSize:
        return ByteSize(value - value % LEAF)

    @property
    def fill_limits(self) -> FillLimits:
        """The part of the settings that bounds one stage's loading."""
        return FillLimits(
            threads=self.read_threads,
            in_flight_bytes=int(self.in_flight),
            extent_bytes=int(self.extent),
            bounce_buffers=self.bounce_buffers,
            retry_deadline=self.retry_deadline,
        )

    @property
    def cuda_limits(self) -> CudaLimits:
        """The part of the settings that GPUs go by."""
        return CudaLimits(reserve=int(self.cuda_reserve), fill_path=self.cuda_fill)

    @property
    def node_limits(self) -> NodeLimits:
        """The part of the settings that bounds what the node does at once."""
        return NodeLimits(
            concurrent_loads=self.concurrent_loads,
            max_queued=self.max_queued,
            revoke_grace=self.revoke_grace,
            trust_peers=self.peer_trust,
        )
