"""What can go wrong with a request or a stage: one class per thing that a caller can do about it.

Every class has a stable ``code``, which is what the HTTP API, the lease socket, metrics and stage records carry.
"""

from __future__ import annotations

from typing import Any, ClassVar

from weightd.daemon.redaction import cleaned, redacted


class DaemonError(Exception):
    """Base of all errors that are reported to a client. ``details`` goes with the message, as JSON values."""

    code: ClassVar[str] = "internal_error"
    remedy: ClassVar[str] = "look into the daemon's log for the traceback, and report it"
    """What to do about it: of the kind, where the message speaks of the case."""

    def __init__(self, message: str, **details: Any) -> None:
        # Libraries put URLs into their errors, signatures and all; from here they go into records, answers and metrics.
        super().__init__(redacted(message))
        self.details: dict[str, Any] = {name: cleaned(value) for name, value in details.items()}


class InvalidRequest(DaemonError):
    """The request contradicts itself or names something impossible: change the request."""

    code = "invalid_request"
    remedy = "change the request as the message says"


class UnknownLayout(InvalidRequest):
    """No layout has this key, or it was given up since for room: upload it (again)."""

    code = "unknown_layout"
    remedy = "let the engine upload its layout again, as it does at its start, or run 'weightd trace'"


class LayoutDiffers(DaemonError):
    """Another layout has this key already: the same engine, version and plan do not lay a model out in two ways."""

    code = "layout_differs"
    remedy = "find out which of the two is right; 'curl -X DELETE' of the one that is there lets the other one in"


class LayoutInUse(DaemonError):
    """A stage is in this layout, by its key: whoever names the key next has to find what is there."""

    code = "layout_in_use"
    remedy = "drop the stage first (weightd rm), then the layout"


class CacheFailed(DaemonError):
    """The daemon cannot write to its cache. The message has the system's words."""

    code = "cache_failed"
    remedy = "make the folder of WEIGHTD_CACHE_DIR writable to the daemon, with room (weightd doctor)"


class NotAllowed(DaemonError):
    """A setting forbids it: ask whoever runs the daemon. The message names the setting."""

    code = "not_allowed"
    remedy = "add the URI's prefix to WEIGHTD_ALLOW, or stage what it names"


class CredentialsRefused(DaemonError):
    """The storage does not let this daemon in (401, 403): mend its credentials, or what they are allowed."""

    code = "credentials_refused"
    remedy = "mend the daemon's credentials, or what they are allowed (weightd doctor), then stage it again"


class CheckpointNotFound(DaemonError):
    """Nothing is at the URI, or a file that belongs to the checkpoint is missing."""

    code = "checkpoint_not_found"
    remedy = "check the URI, and that all files of the checkpoint were uploaded; then stage it again"


class AmbiguousCheckpoint(DaemonError):
    """Several sets of files are at the URI, and nothing says which is the checkpoint: name one."""

    code = "ambiguous_checkpoint"
    remedy = "name the files: the URI of one, or the request's weights (weightd stage --weights), as the message says"


class UnreadableFile(DaemonError):
    """A file is there and this daemon cannot read it: its mode, its archive, its key. The message says which."""

    code = "unreadable_file"
    remedy = "make the file readable to the daemon (mode, archive, encryption key), then stage it again"


class InvalidCheckpoint(DaemonError):
    """A file of the checkpoint lies about itself: nothing of it was trusted, nothing was allocated."""

    code = "invalid_checkpoint"
    remedy = "the stored file itself is wrong: upload it again, then stage it again"


class CheckpointChanged(DaemonError):
    """A file was replaced between planning and the last byte: stage again."""

    code = "checkpoint_changed"
    remedy = "stage it again; publish new weights under a new URI, not in place"


class NotReady(DaemonError):
    """What the daemon is to preload is not there yet. The message says what, and why."""

    code = "not_ready"
    remedy = "wait, or look at what GET /v1/node says of its preload list"


class SourceFailed(DaemonError):
    """The storage kept failing past the deadline: the message says what, where and how often."""

    code = "source_failed"
    remedy = "check credentials (weightd doctor) and that the storage answers from this node, then stage it again"


class DigestMismatch(DaemonError):
    """Bytes are not the expected ones; they were dropped. The message names the tensor and leaf where known."""

    code = "digest_mismatch"
    remedy = "stage it again; where it recurs, check the expected digest, and upload the checkpoint again"


class InsufficientCapacity(DaemonError):
    """The segments do not fit into the device's capacity: drop something, or raise the setting."""

    code = "insufficient_capacity"
    remedy = "end leases, drop or unpin a stage (weightd rm, weightd set --unpin), or raise WEIGHTD_CAPACITY"


class DeviceFailed(DaemonError):
    """The GPU's driver refused something that has nothing to do with room: the message has its words."""

    code = "device_failed"
    remedy = "look at the GPU (nvidia-smi, the kernel's log for Xid errors), then stage it again"


class Lost(DaemonError):
    """The memory went with the daemon that had it: stage the model again."""

    code = "lost"
    remedy = "stage it again; with handle fd its memory outlives the daemon"


class Interrupted(DaemonError):
    """Daemons died while the stage was on its way, one after another: mend what killed them, then stage it again."""

    code = "interrupted"
    remedy = "mend what killed the daemon (weightd doctor names the last exit, its log says more), then stage it again"


class Cancelled(DaemonError):
    """Somebody cancelled the stage, or the daemon is going down."""

    code = "cancelled"
    remedy = "stage it again if it is still wanted"


class QueueFull(DaemonError):
    """Too many stages wait for their turn: try again later. The details say when."""

    code = "queue_full"
    remedy = "wait for stages to end, or raise WEIGHTD_MAX_QUEUED"


class TooManyWatchers(DaemonError):
    """As many clients watch the node as may: close some, or try again later. The details say when."""

    code = "too_many_watchers"
    remedy = "close status pages that nobody looks at"


class TooManyConnections(DaemonError):
    """As many connections are open as may: close some, or try again later."""

    code = "too_many_connections"
    remedy = "close connections that nobody uses, or try again later"


class ReadOnly(DaemonError):
    """This port reads only without its token: use the Unix socket, or show the token. The message says where it is."""

    code = "read_only"
    remedy = "use the Unix socket, or show the token that lies beside it"


HOW_TO_CHANGE = "ask over the Unix socket, as weightd does, or show the token that lies beside it (docs/security.md)"
"""What to do where something is refused as read_only."""


class StageRevoked(DaemonError):
    """The stage is being taken away from its lessees: stage the model again once it has gone."""

    code = "stage_revoked"
    remedy = "stage the model again once it has gone"


class PeersOff(DaemonError):
    """Nothing can be read from this daemon by its peers; the message says why."""

    code = "peers_off"
    remedy = "weightd doctor says why, and what to do"


class NotMovable(DaemonError):
    """The stage is not ready, in use, or being moved already."""

    code = "not_movable"
    remedy = "wait until it is ready, and nobody leases or moves it"


class UnknownStage(DaemonError):
    """No stage has that id (any more)."""

    code = "unknown_stage"
    remedy = "weightd ls has the stages that there are"


class StageLeased(DaemonError):
    """Processes hold leases on the stage: end them first. The details list the holders."""

    code = "stage_leased"
    remedy = "end the leases, or take it away from their holders: weightd rm --force"


class LeaseLimit(DaemonError):
    """Too many lease connections are open: close some."""

    code = "lease_limit"
    remedy = "end leases, or raise WEIGHTD_MAX_LEASES or WEIGHTD_MAX_LEASES_PER_USER"


class PeerNotAllowed(DaemonError):
    """The process at the other end of a Unix socket runs as nobody who may use it."""

    code = "peer_not_allowed"
    remedy = "add the user or group to WEIGHTD_PEER_UIDS or WEIGHTD_PEER_GIDS"
