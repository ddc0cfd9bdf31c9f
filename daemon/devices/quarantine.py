"""GPUs that ended the process, and are left alone until somebody asks to try them again.

What is known of a GPU has to outlive the process that it ends: it lies with the keeper, under ``gpu:<uuid>``. Before
anything is adopted from a GPU that is noted, so that the next daemon knows what the last one was at.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from weightd.daemon.keeper.deposits import Deposits

log = logging.getLogger(__name__)

_PREFIX = "gpu:"
_DEATHS = 2
"""Daemons that may die while they adopt from a GPU, of what is not known to be its error."""
_ERRORS = 3
"""Errors of a GPU that may end daemons which serve, within ``_WINDOW`` seconds."""
_WINDOW = 600.0


@dataclass(frozen=True)
class _Note:
    """What is known of one GPU."""

    reason: str = ""
    """Why it is left alone; empty where it is not."""
    adopting: bool = False
    deaths: int = 0
    """Daemons that died while they adopted from it, one after another."""
    errors: tuple[float, ...] = ()
    """When daemons ended by its errors, in seconds since the epoch."""


class Quarantine:
    """Which GPUs to leave alone. Methods may be called from any thread, as those of ``Deposits``."""

    def __init__(self, deposits: Deposits, held: dict[str, int]) -> None:
        """Takes its own out of what the keeper ``held``."""
        self._deposits = deposits
        self._notes: dict[str, _Note] = {}
        for name in [name for name in held if name.startswith(_PREFIX)]:
            fd = held.pop(name)
            try:
                self._taken_over(name.removeprefix(_PREFIX), _read(fd))
            finally:
                os.close(fd)

    def _taken_over(self, uuid: str, note: _Note) -> None:
        if note.adopting and not note.reason:
            note = replace(note, deaths=note.deaths + 1)
            if note.deaths >= _DEATHS:
                note = replace(note, reason=f"{note.deaths} daemons died while they adopted from it")
        self._put(uuid, replace(note, adopting=False))
        if note.reason:
            log.error(
                "%s is left alone, and what it holds is kept: %s: 'weightd reload' tries it again", uuid, note.reason
            )

    def reason(self, uuid: str | None) -> str:
        """Why a GPU is left alone; empty where it is not."""
        return self._notes.get(uuid or "", _Note()).reason

    @contextmanager
    def adopting(self, uuid: str | None) -> Iterator[None]:
        """What is done inside touches a GPU's memory of before: who dies of it tells the next daemon."""
        if uuid is None:
            yield
            return
        note = self._notes.get(uuid, _Note())
        self._put(uuid, replace(note, adopting=True))
        try:
            yield
        finally:  # whatever was raised, the process goes on
            self._put(uuid, replace(self._notes[uuid], adopting=False, deaths=0))

    def failed(self, uuid: str | None, reason: str) -> None:
        """A GPU's error is about to end this process."""
        if uuid is None:
            return
        note = self._notes.get(uuid, _Note())
        now = time.time()
        errors = (*(at for at in note.errors if at > now - _WINDOW), now)
        if note.adopting:
            note = replace(note, reason=f"adopting from it ended the daemon: {reason}")
        elif len(errors) >= _ERRORS:
            note = replace(note, reason=f"it ended {len(errors)} daemons within {_WINDOW:.0f} s: {reason}")
        self._put(uuid, replace(note, errors=errors))

    def lift(self) -> None:
        """The next daemon is to try them all again."""
        for uuid in list(self._notes):
            self._put(uuid, _Note())

    def _put(self, uuid: str, note: _Note) -> None:
        self._notes[uuid] = note
        if not self._deposits.kept:
            return
        if note == _Note():
            self._deposits.drop(_PREFIX + uuid)
            return
        try:
            fd = os.memfd_create("weightd:gpu", os.MFD_CLOEXEC)
        except OSError as error:
            log.error("%s: what is known of it will not outlive this daemon: %s", uuid, error.strerror)
            return
        try:
            os.write(fd, json.dumps(asdict(note)).encode())
            self._deposits.put(_PREFIX + uuid, fd)
        finally:
            os.close(fd)


def _read(fd: int) -> _Note:
    """A note; an empty one where another version wrote what this one does not understand."""
    try:
        table = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
        errors = tuple(float(at) for at in table["errors"])
        return _Note(str(table["reason"]), bool(table["adopting"]), int(table["deaths"]), errors)
    except (ValueError, KeyError, TypeError):
        return _Note()
