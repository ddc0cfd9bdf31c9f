"""What is known of a stage's leaves, to hold against what peers claim, and what they bring."""

from __future__ import annotations

from collections.abc import Sequence

from weightd.daemon.filling.account import Account
from weightd.daemon.layouts.recipe import Recipe
from weightd.daemon.peers.finding.claims import Claims
from weightd.daemon.peers.moving.parts import Span
from weightd.daemon.peers.pulling.groups import Groups


class Truth:
    """The leaves that the origin has brought, and the digests that are expected of others."""

    def __init__(self, account: Account, groups: Groups, recipes: Sequence[Recipe]) -> None:
        self._account = account
        self._groups = groups
        self._recipes = recipes

    def wrong_claim(self, claims: Claims, segment: int, first: int, count: int) -> str:
        """Which of these leaves this node has from the origin with another digest than claimed; empty where none."""
        there = self._account.there[segment]
        if not there.count(1, first, first + count):
            return ""
        for leaf in range(first, first + count):
            group = self._groups.of_leaf(segment, leaf)
            if there[leaf] and claims.there[segment][leaf] and group is not None and group.brought_by is None:
                entry, at = self._account.leaf_at(segment, leaf)
                if self._account.leaves[segment][entry][at] != claims.digests[segment][leaf]:
                    return f"{self._name(segment, entry, at)}: not the digest that the origin's bytes have"
        return ""

    def wrong_bytes(self, claims: Claims, found: Sequence[tuple[Span, int, int]]) -> str:
        """What is wrong with (span, leaf, digest) of what a peer has brought; empty where nothing is."""
        for span, leaf, digest in found:
            first = self._account.leaf_starts(span.segment)[span.entry]
            claimed = claims.digests[span.segment][first + leaf] == digest
            if not claimed or self._account.expected_leaf(span.segment, span.entry, leaf) not in (None, digest):
                what = "not the expected bytes" if claimed else "not the bytes that it claims"
                return f"{self._name(span.segment, span.entry, leaf)}: {what}"
        return ""

    def _name(self, segment: int, entry: int, leaf: int) -> str:
        return f"tensor {self._recipes[segment].entries[entry].name!r}, leaf {leaf}"
