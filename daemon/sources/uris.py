"""Where bytes come from: URIs, and the sources behind them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from urllib.parse import unquote

from weightd.daemon.errors import InvalidRequest, NotAllowed
from weightd.daemon.redaction import holds_secret
from weightd.daemon.sources.base import Reader, Source, SourceFile

__all__ = ["OPENERS", "Allow", "Reader", "Source", "SourceFile", "canonical", "open_source"]

OPENERS = {
    "file": "weightd.daemon.sources.file",
    "s3": "weightd.daemon.sources.object_store",
    "gs": "weightd.daemon.sources.object_store",
    "az": "weightd.daemon.sources.object_store",
    "hf": "weightd.daemon.sources.hub",
}
"""URI scheme → module with ``open_source(uri, allow) -> Source``, imported when first asked for."""

MAX_URI_BYTES = 4096


class Allow:
    """The allow-list of what may be staged: URI prefixes that end at a path component; an empty list allows all."""

    def __init__(self, prefixes: Sequence[str] = ()) -> None:
        self.prefixes = tuple(prefix if prefix.endswith("://") else canonical(prefix) for prefix in prefixes)

    def check(self, uri: str) -> None:
        """Raise NotAllowed where ``uri`` (canonical; for files, with symbolic links resolved) is under no prefix."""
        if self.permits(uri):
            return
        raise NotAllowed(
            f"{uri} is not below any allowed URI prefix ({', '.join(self.prefixes)}): "
            "the setting WEIGHTD_ALLOW (serve --allow) decides",
            setting="WEIGHTD_ALLOW",
            allowed=list(self.prefixes),
        )

    def permits(self, uri: str) -> bool:
        """Whether what is at a URI (as ``check`` has it) may be staged."""
        return not self.prefixes or any(_is_below(uri, prefix) for prefix in self.prefixes)

    def leads_to(self, beginning: str) -> bool:
        """Whether anything that may be staged has a URI that begins so."""
        return self.permits(beginning) or any(prefix.startswith(beginning) for prefix in self.prefixes)


def _is_below(uri: str, prefix: str) -> bool:
    if prefix.startswith("hf://") and uri.startswith("hf://"):
        uri, _, revision = uri.partition("@")
        prefix, _, allowed = prefix.partition("@")
        if allowed and revision != allowed:
            return False
    return uri == prefix or uri.startswith(prefix if prefix.endswith("/") else prefix + "/")


def canonical(uri: str) -> str:
    """One spelling for one place: ``file:///abs/path``, ``s3://bucket/prefix``, ``hf://org/name/folder@revision``.

    A bare absolute path is a file URI, in which a percent sign is escaped and nothing else. Raises InvalidRequest for
    anything else that is no URI of a known scheme.
    """
    if not uri or len(uri.encode(errors="replace")) > MAX_URI_BYTES:
        raise InvalidRequest(f"model: a URI has 1 to {MAX_URI_BYTES} bytes, found {len(uri)}")
    if any(ord(character) < 32 or character == "\x7f" for character in uri):
        raise InvalidRequest("model: the URI holds control characters")
    if uri.startswith("/"):
        return file_uri(_absolute(uri))
    scheme, separator, rest = uri.partition(":")
    scheme = scheme.lower()
    if not separator or scheme not in OPENERS:
        raise InvalidRequest(
            f"model: {uri!r} is neither an absolute path nor a URI of a known scheme ({', '.join(OPENERS)})"
        )
    if scheme == "file":
        path = unquote(rest.removeprefix("//").removeprefix("localhost"))
        if not path.startswith("/"):
            raise InvalidRequest(f"model: {uri!r}: a file URI needs an absolute path, as in file:///models/llama")
        return file_uri(_absolute(path))
    if holds_secret(uri) or re.match(r"(s3|gs|az)://[^/]*@", uri, re.IGNORECASE):
        raise InvalidRequest(
            "model: the URI holds what looks like a credential or a signature: the daemon's environment has these"
        )
    if not rest.startswith("//") or not rest.strip("/"):
        raise InvalidRequest(f"model: {uri!r}: expected {scheme}://name/...")
    parts = [part for part in rest.split("/") if part]
    if "." in parts or ".." in parts:
        raise InvalidRequest(f"model: {uri!r}: '.' and '..' are not allowed in it")
    return f"{scheme}://" + "/".join(parts)


def file_uri(path: str) -> str:
    """The URI of an absolute path."""
    return "file://" + path.replace("%", "%25")


def file_path(uri: str) -> str:
    """The path that ``file_uri`` made a URI of."""
    return uri.removeprefix("file://").replace("%25", "%")


def _absolute(path: str) -> str:
    return posixpath.normpath("/" + path.lstrip("/"))


def open_source(uri: str, allow: Allow) -> Source:
    """The source behind a canonical URI. Raises NotAllowed, CheckpointNotFound, InvalidRequest."""
    module = import_module(OPENERS[uri.partition(":")[0]])
    opener: Callable[[str, Allow], Source] = module.open_source
    return opener(uri, allow)
