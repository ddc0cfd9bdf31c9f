"""The fleet, as stages load from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from weightd.daemon.devices.base import Segment
from weightd.daemon.filling.fill import Fill
from weightd.daemon.layouts.extents import Extent
from weightd.daemon.layouts.recipe import Recipe
from weightd.daemon.peers.finding.fleet import Fleet
from weightd.daemon.peers.moving.movers import Movers
from weightd.daemon.peers.pulling.groups import begin_parts_anew
from weightd.daemon.peers.pulling.reader import PeerReader
from weightd.daemon.sources.base import Reader


class Pulling:
    """Makes their readers. Its methods are for any thread."""

    def __init__(self, fleet: Fleet, movers: Movers) -> None:
        self._fleet = fleet
        self._movers = movers

    @property
    def off(self) -> str:
        return self._fleet.off

    def reader(
        self,
        key: str,
        recipes: Sequence[Recipe],
        segments: Sequence[Segment],
        extents: Sequence[Extent],
        fill: Fill,
        origin: Callable[[], Reader] | None,
    ) -> Reader:
        begin_parts_anew(extents, recipes, fill.account)
        return PeerReader(key, self._fleet, self._movers, recipes, segments, fill, origin)
