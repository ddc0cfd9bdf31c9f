"""The few routes of the Hugging Face hub that listing and downloading a model use, over a local folder."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789012345678901234567890123456789"


class Hub:
    """A hub with one repository, ``org/name``, whose only commit is ``folder``. Close it, or use it in ``with``."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        handler = type("Handler", (_Handler,), {"folder": folder, "asked": self.asked})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def env(self, home: Path) -> dict[str, str]:
        """The environment of who uses it, with a cache below ``home``."""
        return {"HF_HOME": str(home), "HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1"}

    def listed(self) -> int:
        """How often it was asked for the list of files."""
        return sum(path.startswith("/api/models/") for path in self.asked)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    asked: list[str]

    def _answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/name"):
            files = [
                {
                    "rfilename": item.relative_to(self.folder).as_posix(),
                    "size": item.stat().st_size,
                    "blobId": blob(item.read_bytes()),
                }
                for item in sorted(self.folder.rglob("*"))
                if item.is_file()
            ]
            info = {"id": "org/name", "modelId": "org/name", "sha": COMMIT, "siblings": files, "private": False,
                    "tags": [], "downloads": 0}  # fmt: skip
            self._answer(json.dumps(info).encode(), Content_Type="application/json")
            return
        place, _, name = path.removeprefix("/org/name/resolve/").partition("/")
        item = self.folder / name
        if not path.startswith("/org/name/resolve/") or place not in ("main", COMMIT) or not item.is_file():
            self.send_error(404)
            return
        body = item.read_bytes()
        self._answer(body, ETag=f'"{blob(body)}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def blob(content: bytes) -> str:
    """The name by which the hub and its cache know a file's content."""
    return hashlib.sha1(content).hexdigest()


def cache(home: Path, folder: Path, *names: str, ref: str = "main") -> None:
    """Put files of the repository into the cache as downloads do."""
    place = home / "hub" / "models--org--name"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / ref).write_text(COMMIT)
    (place / "snapshots" / COMMIT).mkdir(parents=True, exist_ok=True)
    for name in names:
        content = (folder / name).read_bytes()
        path = place / "snapshots" / COMMIT / name
        (place / "blobs").mkdir(exist_ok=True)
        (place / "blobs" / blob(content)).write_bytes(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(place / "blobs" / blob(content))
