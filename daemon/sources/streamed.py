"""Reading through the native streamer of runai-model-streamer, whose threads write each range to its final address."""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from weightd.daemon.devices import libstreamer
from weightd.daemon.errors import CheckpointChanged, CheckpointNotFound, CredentialsRefused, SourceFailed
from weightd.daemon.filling.sink import Landing, Sink
from weightd.daemon.layouts.extents import Extent
from weightd.daemon.sources.base import Source, SourceFile, changed
from weightd.daemon.sources.window import Window
from weightd.ipc.cuda import gpu_by_name

# Codes of libstreamer 0.17, by what they mean for the range. Trying again can help: file access (what every HTTP error
# comes out as), end of file, too many open files, unknown, unexpected number of bytes, retryable, and asynchronous file
# reads, which it then makes synchronously.
_RETRYABLE = frozenset({2, 3, 6, 11, 15, 19, 22})


class _Due(NamedTuple):
    """An extent to be asked for at a time (monotonic seconds), earlier ones in a file first."""

    at: float
    file: int
    offset: int
    extent: Extent


class StreamerReader:
    """Keeps a bounded number of bytes in flight in one native streamer, and takes ranges as they land.

    ``uris`` are the files', as the library takes them: an object's, or a path. Where ``opened`` has the files'
    descriptors, which are the reader's own until it is closed, it is these that are read. Bytes go to host memory, or
    straight to a GPU where the sink's landing says so.

    A streamer serves one stage, and so one set of credentials, however many files there are: closing it is the
    library's only way to say that nothing writes to this stage's memory any more.
    """

    def __init__(
        self,
        source: Source,
        files: Sequence[SourceFile],
        uris: Sequence[str],
        credentials: Callable[[], Mapping[str, str]] = dict,
        opened: Sequence[int] = (),
    ) -> None:
        """``credentials`` are asked for what a streamer is to be told, which it then keeps: where a range has failed,
        and they are others by now, what is in flight is asked for anew with these."""
        self._source = source
        self._files = files
        self._uris = uris
        self._credentials = credentials
        self._used = credentials()
        self._opened = list(opened)
        self._read_as = [f"/proc/self/fd/{fd}" for fd in opened] or uris
        self._gpu: int | None = None
        """A GPU that bytes were sent to."""
        try:
            self._streamer = libstreamer.Streamer(self._used)
        except (libstreamer.StreamerUnavailable, OSError) as error:
            self._close_files()
            raise SourceFailed(f"{uris[0]}: {error}") from None

    def run(self, sink: Sink) -> None:
        in_flight: dict[int, tuple[Extent, Landing]] = {}
        waiting: list[_Due] = []
        nbytes = 0
        window = Window(sink.in_flight_bytes, sink.extent_bytes)
        last_progress = time.monotonic()
        while not sink.stopped:
            if not in_flight:
                last_progress = time.monotonic()
            deferred: list[_Due] = []  # due, but with no bounce buffer to be had
            while nbytes < window.nbytes and len(deferred) <= len(in_flight):
                extent = self._next(sink, waiting)
                if extent is None:
                    break
                landing = sink.landing(extent, wait=False)
                if landing is None:
                    deferred.append(_Due(time.monotonic(), extent.file, extent.offset, extent))
                    continue
                in_flight[self._submit(sink, extent, landing)] = (extent, landing)
                nbytes += extent.nbytes
            for due in deferred:
                heapq.heappush(waiting, due)
            if not in_flight:
                if not waiting:
                    return
                sink.wait(max(0.001, waiting[0].at - time.monotonic()), "buffers" if deferred else "source")
                continue
            with sink.phase("source"):
                response = self._streamer.response(0.1)
            if response is None:
                sink.check_stall(last_progress, [self._uris[extent.file] for extent, _ in in_flight.values()])
                continue
            last_progress = time.monotonic()
            extent, landing = in_flight.pop(response.submission)
            nbytes -= extent.nbytes
            if response.code == libstreamer.SUCCESS:
                window.landed(extent.nbytes, last_progress)
                sink.landed(extent, landing)
                continue
            at = time.monotonic() + self._failed(sink, extent, response.code)
            again = [(extent, landing)]
            if self._expired() or response.code == libstreamer.UNKNOWN:
                # All that is in flight is asked for anew, once nothing of the old streamer can still write.
                self._close_streamer()
                self._streamer = libstreamer.Streamer(self._used)
                again += in_flight.values()
                in_flight.clear()
                nbytes = 0
            for other, place in again:
                sink.abandon(place)
                heapq.heappush(waiting, _Due(at, other.file, other.offset, other))

    def _next(self, sink: Sink, waiting: list[_Due]) -> Extent | None:
        """What to ask for next: what failed and is due again before what is new."""
        if waiting and waiting[0].at <= time.monotonic():
            return heapq.heappop(waiting).extent
        return sink.next()

    def _failed(self, sink: Sink, extent: Extent, code: int) -> float:
        """Seconds until the next try; raises where there is no point in one. HEAD says why, the library does not."""
        uri, planned = self._uris[extent.file], self._files[extent.file]
        if code not in _RETRYABLE:
            raise SourceFailed(f"{uri}: {libstreamer.describe(code)} (libstreamer code {code})")
        if not extent.attempts:
            try:
                found = self._source.stat(planned.name)
            except CheckpointNotFound:
                raise CheckpointChanged(f"{uri} was there when planning, and is gone: stage it again") from None
            except SourceFailed:
                pass  # the store is away: that may pass
            else:
                if found != planned:
                    raise changed(planned, found)
        return sink.failed(extent, uri, libstreamer.describe(code))

    def _expired(self) -> bool:
        """Whether the credentials are others than the streamer has; these are used from now on."""
        try:
            now = self._credentials()
        except CredentialsRefused:
            return False  # whoever gives them out is away: that may pass, as the store's being away
        changed, self._used = now != self._used, now
        return changed

    def _submit(self, sink: Sink, extent: Extent, landing: Landing) -> int:
        if landing.device is not None:
            self._gpu = landing.device
        while True:
            try:
                return self._streamer.submit(
                    self._read_as[extent.file], [extent.offset], [extent.nbytes], [landing.address], landing.device
                )
            except OSError as error:
                sink.wait(sink.failed(extent, self._uris[extent.file], str(error)))

    def close(self) -> None:
        try:
            self._close_streamer()
        finally:
            self._close_files()

    def _close_files(self) -> None:
        while self._opened:
            os.close(self._opened.pop())

    def _close_streamer(self) -> None:
        # The library lets go of what it had on a GPU in whatever context it finds.
        self._streamer.close(gpu_by_name(f"cuda:{self._gpu}").context if self._gpu is not None else None)
