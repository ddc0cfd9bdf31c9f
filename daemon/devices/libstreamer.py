"""The C ABI of runai-model-streamer's ``libstreamer.so``, bound by ctypes.

The streamer's own Python package imports torch (217 MB, over a second), which the daemon never does, so the shared
library is bound directly. The ABI is that of runai-model-streamer 0.17 (`runai_model_streamer/libstreamer`): many
ranges per submission, each with an absolute destination address, many submissions in flight, one response per range.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

SUPPORTED_RELEASE = "0.17"
"""The release series whose ABI this file was written against; another one is refused, not guessed at."""

SUCCESS = 0
FINISHED = 1
TIMED_OUT = 16
UNKNOWN = 11
"""After it the library may still write to the destination, until it is ended."""


class StreamerUnavailable(RuntimeError):
    """The native library is not installed, or is of a release whose ABI is not known here."""


class _Device(ctypes.Structure):
    # Passed by value. kind: 0 host memory, 1 CUDA; ordinal: the CUDA device.
    _fields_ = (("kind", ctypes.c_int), ("ordinal", ctypes.c_int))


_HOST = _Device(0, 0)
_CUDA = 1


class Response(NamedTuple):
    """One range of one submission has ended: ``code`` is 0, or why it failed."""

    code: int
    submission: int
    file_index: int
    range_index: int


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """Bind the library. Raises StreamerUnavailable, with the remedy, where that cannot be done."""
    try:
        release = metadata.version("runai-model-streamer")
    except metadata.PackageNotFoundError:
        raise StreamerUnavailable(
            "runai-model-streamer is not installed: pip install 'weightd[daemon]' brings it"
        ) from None
    if not release.startswith(SUPPORTED_RELEASE + "."):
        raise StreamerUnavailable(
            f"runai-model-streamer {release} is installed, {SUPPORTED_RELEASE}.* is supported: "
            f"pip install 'runai-model-streamer=={SUPPORTED_RELEASE}.*'"
        )
    # find_spec of a top-level package reads no code of it: the package itself would import torch.
    spec = importlib.util.find_spec("runai_model_streamer")
    if spec is None or not spec.submodule_search_locations:
        raise StreamerUnavailable("runai-model-streamer is installed without its package folder: reinstall it")
    path = Path(spec.submodule_search_locations[0]) / "libstreamer" / "lib" / "libstreamer.so"
    # As many threads as the machine has use for; its own default is a fixed number.
    os.environ.setdefault("RUNAI_STREAMER_OBJ_CONCURRENCY", str(min(32, 2 * len(os.sched_getaffinity(0)))))
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise StreamerUnavailable(f"{path} cannot be loaded: {error}") from error
    handle, size_t, uint32, uint64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_uint64
    pointer = ctypes.POINTER
    lib.runai_file_streamer_start.argtypes = [pointer(handle)]
    lib.runai_file_streamer_end.argtypes = [handle]
    lib.runai_file_streamer_end.restype = None
    lib.runai_file_streamer_set_credentials.argtypes = [
        handle,
        pointer(ctypes.c_char_p),
        pointer(ctypes.c_char_p),
        ctypes.c_uint,
    ]
    lib.runai_file_streamer_request.argtypes = [
        handle,
        pointer(uint64),
        uint32,
        pointer(ctypes.c_char_p),
        pointer(uint32),
        pointer(size_t),
        pointer(size_t),
        pointer(handle),
        _Device,
    ]
    lib.runai_file_streamer_response.argtypes = [
        handle,
        pointer(uint64),
        pointer(uint32),
        pointer(uint32),
        pointer(ctypes.c_int),
        ctypes.c_uint,
    ]
    lib.runai_file_streamer_response_str.argtypes = [ctypes.c_int]
    lib.runai_file_streamer_response_str.restype = ctypes.c_char_p
    return lib


def address_by(*, virtual: bool) -> None:
    """Whether S3 clients that are made from now on name a bucket in the host's name or in the path.

    The library takes this from the environment alone, for the whole process: it is written where it differs only, so
    that in effect it is before the first S3 client, as others may be reading the environment.
    """
    value = str(int(virtual))
    if os.environ.get("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "1") != value:
        os.environ["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] = value


def describe(code: int) -> str:
    """The library's own words for a response code."""
    text: bytes = load().runai_file_streamer_response_str(code)
    return text.decode(errors="replace")


class _Ended(NamedTuple):
    """A native streamer that nobody uses any more."""

    handle: ctypes.c_void_p
    context: Callable[[], AbstractContextManager[object]] | None
    """In what it is to be ended, where it has sent bytes to a GPU."""
    credentials: Mapping[str, str]
    """What it was told to use, which it keeps as long as it lives."""


class _Users:
    """Who uses the library in this process.

    Ending one native streamer shuts down the object stores' clients of all of them (0.17): what the others have asked
    for comes back as FINISHED, or ends the process. So they are ended when nobody uses any, and used again until then.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.active = 0
        self.idle: list[_Ended] = []
        """To be used again, or ended when nobody uses any."""
        self.unsettled: list[_Ended] = []
        """That may still write to where they were told to, until they are ended."""
        self.ends = 0
        self.waiting = 0
        """Who wait for that end: nobody else begins until it has come, or it might never."""

    def end_all(self) -> None:
        """Nobody uses any: end them. With ``changed`` held."""
        for ended in (*self.idle, *self.unsettled):
            with ended.context() if ended.context else contextlib.nullcontext():
                load().runai_file_streamer_end(ended.handle)
        self.idle, self.unsettled = [], []
        self.ends += 1
        self.changed.notify_all()


_users = _Users()


class Streamer:
    """One native streamer: its threads, its object store clients, one set of credentials.

    Not thread-safe: one thread submits and takes responses. Memory named as a destination must stay mapped until
    ``close()`` has returned: a request that was sent cannot be called back.
    """

    def __init__(self, credentials: Mapping[str, str] | None = None) -> None:
        """Start the library's threads; ``credentials`` overrides the ambient ones, keys as in the S3 plugin.

        Keys: ``access_key_id``, ``secret_access_key``, ``session_token``, ``region``, ``endpoint``. With empty ones of
        the first two, requests to S3 have no signature.
        """
        self._lib = load()
        self._handle = ctypes.c_void_p(0)
        self._outstanding = 0
        self._unsettled = False
        self._credentials = dict(credentials or {})
        with _users.changed:
            _users.changed.wait_for(lambda: not _users.waiting)
            again = next(
                (ended for ended in _users.idle if ended.context is None and ended.credentials == self._credentials),
                None,
            )
            if again is not None:
                _users.idle.remove(again)
                self._handle = again.handle
            else:
                self._start()
            _users.active += 1

    def _start(self) -> None:
        self._check(self._lib.runai_file_streamer_start(ctypes.byref(self._handle)), "start")
        count = len(self._credentials)
        if count:
            keys = (ctypes.c_char_p * count)(*[key.encode() for key in self._credentials])
            values = (ctypes.c_char_p * count)(*[value.encode() for value in self._credentials.values()])
            self._check(self._lib.runai_file_streamer_set_credentials(self._handle, keys, values, count), "credentials")

    def _check(self, code: int, what: str) -> None:
        if code != SUCCESS:
            raise OSError(f"libstreamer {what}: {describe(code)} (code {code})")

    def submit(
        self,
        uri: str,
        offsets: Sequence[int],
        sizes: Sequence[int],
        addresses: Sequence[int],
        device: int | None = None,
    ) -> int:
        """Ask for ranges of one object, each to its own absolute address; returns the submission's number.

        Bytes land in any order. The three sequences are parallel; offsets and sizes in bytes. ``device`` is the number
        of the GPU whose memory the addresses are, as the driver counts them in this process; None: host memory. Does
        not block. Raises OSError where the library refuses the submission as a whole (nothing of it is in flight then).
        """
        count = len(sizes)
        submission = ctypes.c_uint64()
        code = self._lib.runai_file_streamer_request(
            self._handle,
            ctypes.byref(submission),
            1,
            (ctypes.c_char_p * 1)(uri.encode()),
            (ctypes.c_uint32 * 1)(count),
            (ctypes.c_size_t * count)(*offsets),
            (ctypes.c_size_t * count)(*sizes),
            (ctypes.c_void_p * count)(*addresses),
            _HOST if device is None else _Device(_CUDA, device),
        )
        self._check(code, "request")
        self._outstanding += count
        return submission.value

    def response(self, timeout: float) -> Response | None:
        """The next range that ended, or None after ``timeout`` seconds (at least a millisecond)."""
        submission = ctypes.c_uint64()
        file_index, range_index = ctypes.c_uint32(), ctypes.c_uint32()
        done = ctypes.c_int()
        code = self._lib.runai_file_streamer_response(
            self._handle,
            ctypes.byref(submission),
            ctypes.byref(file_index),
            ctypes.byref(range_index),
            ctypes.byref(done),
            max(1, int(timeout * 1000)),
        )
        if code == TIMED_OUT:
            return None
        if code == FINISHED:
            raise OSError("libstreamer has ended while responses were awaited")
        self._outstanding -= 1
        self._unsettled = self._unsettled or code == UNKNOWN
        return Response(code, submission.value, file_index.value, range_index.value)

    def close(self, context: Callable[[], AbstractContextManager[object]] | None = None) -> None:
        """Return when nothing is written to any destination any more, however long that takes. Safe to call twice.

        ``context``: in what the library lets go of what it had on a GPU.
        """
        if not self._handle:
            return
        ended, self._handle = _Ended(self._handle, context, self._credentials), ctypes.c_void_p(0)
        with _users.changed:
            if _users.active == 1:  # the library's own end waits for what is in flight, and drops what is queued
                _users.active = 0
                _users.unsettled.append(ended)
                _users.end_all()
                return
        self._drain(ended.handle)
        with _users.changed:
            _users.active -= 1
            (_users.unsettled if self._unsettled else _users.idle).append(ended)
            if not _users.active:
                _users.end_all()
            elif self._unsettled:
                ends = _users.ends
                _users.waiting += 1
                _users.changed.wait_for(lambda: _users.ends != ends)
                _users.waiting -= 1
                _users.changed.notify_all()

    def _drain(self, handle: ctypes.c_void_p) -> None:
        """Wait for all that was asked for, others being there whom an end would break."""
        self._handle = handle
        try:
            while self._outstanding:
                self.response(0.1)
        except OSError:
            self._unsettled = True
        finally:
            self._handle = ctypes.c_void_p(0)
