"""What the origin brings of a stage that peers bring as well: its own reader, in a thread, as long as that works."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from weightd.daemon.errors import SourceFailed
from weightd.daemon.filling.fill import Fill
from weightd.daemon.filling.sink import Share
from weightd.daemon.peers.moving.parts import leaf_ranges
from weightd.daemon.peers.pulling.groups import Group
from weightd.daemon.peers.pulling.pace import Pace
from weightd.daemon.sources.base import Reader

log = logging.getLogger(__name__)


_ALONE = 64
"""Groups that it is given at once where nobody else is there."""


class Origin:
    """The origin's share of a fill. ``make`` makes its reader; None where all has to come from peers.

    Methods are for one thread, between ``begin`` and ``stop``; ``close`` is for afterwards.
    """

    def __init__(self, make: Callable[[], Reader] | None) -> None:
        self.groups: set[int] = set()
        """What it was given, and that is not here yet."""
        self.error: BaseException | None = None
        """Why nothing comes from it any more."""
        self._make = make
        self._reader: Reader | None = None
        self._thread: threading.Thread | None = None
        self._pace = Pace(0.5, most=_ALONE)

    def begin(self, fill: Fill) -> None:
        """From now on it may be given what to read."""
        self._account = fill.account
        self._share = Share(fill)

    @property
    def exists(self) -> bool:
        """Whether anything is to come from it at all."""
        return self._make is not None

    @property
    def works(self) -> bool:
        """Whether it can be given anything."""
        return self._make is not None and self.error is None

    def room(self, *, alone: bool, here: int) -> int:
        """How many more groups it can be given now, of which there are ``here``.

        What it was given cannot be called back, and where this node is not ``alone`` others may begin at the same time.
        """
        return (_ALONE if alone else min(self._pace.at_once, 1 + here)) - len(self.groups)

    def read(self, groups: Sequence[Group]) -> None:
        """Read these, and whatever it was given before and has not begun with."""
        if groups:
            self.groups.update(group.index for group in groups)
            self._account.begun(
                (span.segment, span.entry, span.leaf, len(leaf_ranges(span)))
                for group in groups
                for span in group.spans
            )
            self._account.requeue(extent for group in groups for extent in group.extents)
        if self._account.queued and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="origin", daemon=True)
            self._thread.start()

    def brought(self, group: int) -> bool:
        """A group is here; whether that was given to the origin."""
        if group not in self.groups:
            return False
        self.groups.discard(group)
        self._pace.came()
        return True

    def left_over(self) -> set[int]:
        """What it was given and will not bring, because it has failed. Raises what is no failure of the source."""
        if self._thread is None or self._thread.is_alive():
            return set()
        self._thread.join()
        self._thread = None
        if self.error is None:
            return set()
        if not isinstance(self.error, SourceFailed):
            raise self.error
        log.warning("the origin fails, what is missing is to come from peers: %s", self.error)
        self._account.drain()
        left, self.groups = self.groups, set()
        return left

    def _run(self) -> None:
        try:
            if self._reader is None:
                assert self._make is not None
                self._reader = self._make()
            self._reader.run(self._share)
        except BaseException as error:
            # What it has asked for may still be written, and only its end says that nothing is. Nor may what it has
            # failed of keep views of segments.
            if self._reader is not None:
                self._reader.close()
                self._reader = None
            self.error = error.with_traceback(None)
            self.error.__context__ = self.error.__cause__ = None

    def stop(self) -> None:
        """Return when its reader has stopped, whatever it was given."""
        if self._thread is not None:
            self._share.stop()
            self._thread.join()

    def close(self) -> None:
        """Return when nothing of it can write anywhere any more."""
        if self._reader is not None:
            self._reader.close()
