"""Label values for what comes from outside: bounded in length and number, printable, and never a secret."""

from __future__ import annotations

import hashlib

OTHER = "other"
"""Stands for everything that has no series of its own."""
_MAX = 120
"""Characters of a value."""


def label(text: str) -> str:
    """A value that any exposition can carry: what is too long keeps its ends, and gets a digest that tells it apart."""
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    if len(text) <= _MAX:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[:40]}…{text[40 + 10 - _MAX :]}~{digest}"


def model_label(uri: str) -> str:
    """A checkpoint's canonical URI, without what may be a secret in it: a query (signed URLs), a user with password."""
    scheme, separator, rest = uri.partition("://")
    if separator and scheme != "file":
        rest = rest.partition("?")[0].partition("#")[0]
        authority, slash, path = rest.partition("/")
        rest = authority.rpartition("@")[2] + slash + path
    return label(scheme + separator + rest)


class Named:
    """The first ``most`` names have series of their own, all others are ``OTHER``. A name keeps what it has."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        if (found := self._known.get(name)) is not None:
            return found
        if len(self._known) >= self._most:
            return OTHER
        return self._known.setdefault(name, label(name))
