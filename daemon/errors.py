"""What can go wrong with a request or a stage: one class per thing that a caller can do about it.

Every class has a stable ``code``, which is what the HTTP API, the lease socket, metrics and stage records carry.
"""

from __future__ import annotations

from typing import Any, ClassVar

from weightd.daemon.logs import cleaned, redacted


class DaemonError(Exception):
    """Base of all errors that are reported to a client. ``details`` goes with the message, as JSON values."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, **details: Any) -> None:
        # Libraries put URLs into their errors, signatures and all; from here they go into records, answers and metrics.
        super().__init__(redacted(message))
        self.details: dict[str, Any] = {name: cleaned(value) for name, value in details.items()}


class InvalidRequest(DaemonError):
    """The request contradicts itself or names something impossible: change the request."""

    code = "invalid_request"


class NotAllowed(DaemonError):
    """A setting forbids it: ask whoever runs the daemon. The message names the setting."""

    code = "not_allowed"


class CredentialsRefused(DaemonError):
    """The storage does not let this daemon in (401, 403): mend its credentials, or what they are allowed."""

    code = "credentials_refused"


class CheckpointNotFound(DaemonError):
    """Nothing is at the URI, or a file that belongs to the checkpoint is missing."""

    code = "checkpoint_not_found"


class InvalidCheckpoint(DaemonError):
    """A file of the checkpoint lies about itself: nothing of it was trusted, nothing was allocated."""

    code = "invalid_checkpoint"


class CheckpointChanged(DaemonError):
    """A file was replaced between planning and the last byte: stage again."""

    code = "checkpoint_changed"


class NotReady(DaemonError):
    """What the daemon is to preload is not there yet. The message says what, and why."""

    code = "not_ready"


class SourceFailed(DaemonError):
    """The storage kept failing past the deadline: the message says what, where and how often."""

    code = "source_failed"


class DigestMismatch(DaemonError):
    """Bytes are not the expected ones; they were dropped. The message names the tensor and leaf where known."""

    code = "digest_mismatch"


class InsufficientCapacity(DaemonError):
    """The segments do not fit into the device's capacity: drop something, or raise the setting."""

    code = "insufficient_capacity"


class DeviceFailed(DaemonError):
    """The GPU's driver refused something that has nothing to do with room: the message has its words."""

    code = "device_failed"


class Lost(DaemonError):
    """The memory went with the daemon that had it: stage the model again."""

    code = "lost"


class Cancelled(DaemonError):
    """Somebody cancelled the stage, or the daemon is going down."""

    code = "cancelled"


class QueueFull(DaemonError):
    """Too many stages wait for their turn: try again later. The details say when."""

    code = "queue_full"


class StageRevoked(DaemonError):
    """The stage is being taken away from its lessees: stage the model again once it has gone."""

    code = "stage_revoked"


class PeersOff(DaemonError):
    """Nothing can be read from this daemon by its peers; the message says why."""

    code = "peers_off"


class NotMovable(DaemonError):
    """The stage is not ready, in use, or being moved already."""

    code = "not_movable"


class UnknownStage(DaemonError):
    """No stage has that id (any more)."""

    code = "unknown_stage"


class StageLeased(DaemonError):
    """Processes hold leases on the stage: end them first. The details list the holders."""

    code = "stage_leased"


class LeaseLimit(DaemonError):
    """Too many lease connections are open: close some."""

    code = "lease_limit"


class PeerNotAllowed(DaemonError):
    """The process at the other end of a Unix socket runs as nobody who may use it."""

    code = "peer_not_allowed"
