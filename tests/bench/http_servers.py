"""What sends files over HTTP as fast as anything does, and a client that does nothing with them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.bench.measure import Sample
from tests.servers import free_ports, until

_SECONDS = 4
_CONNECTIONS = 8


@contextmanager
def nginx(folder: Path, root: Path) -> Iterator[str | None]:
    """The URL of an nginx that sends the files below ``root``; None where it is not installed."""
    if shutil.which("nginx") is None:
        yield None
        return
    (port,) = free_ports(1)
    folder.mkdir()
    (folder / "nginx.conf").write_text(
        f"daemon off; worker_processes auto; pid {folder}/pid; error_log {folder}/log; events {{}}\n"
        + ("user root;\n" if os.geteuid() == 0 else "")
        + f"http {{ access_log off; sendfile on; sendfile_max_chunk 2m; tcp_nopush on; keepalive_requests 100000;\n"
        f"  server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
    )
    process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")])
    try:
        until(lambda: (folder / "pid").exists(), "nginx is up")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def wrk(folder: Path, url: str, paths: Sequence[str], sizes: Sequence[int], part: int) -> Sample:
    """Ranges of ``part`` bytes of files, one after another, for some seconds: a client in C that drops what it gets."""
    ranges = [
        f'{{"{path}", "bytes={first}-{min(first + part, size) - 1}"}}'
        for path, size in zip(paths, sizes, strict=True)
        for first in range(0, size, part)
    ]
    script = folder / "ranges.lua"
    script.write_text(
        f"local ranges = {{{', '.join(ranges)}}}\nlocal next = 0\n"
        "request = function()\n  next = next % #ranges + 1\n"
        '  return wrk.format("GET", ranges[next][1], {["Range"] = ranges[next][2]})\nend\n'
        "done = function(summary)\n  local errors = summary.errors\n"
        '  print("DONE", summary.bytes, summary.duration, errors.status + errors.read + errors.connect)\nend\n'
    )
    command = ["wrk", "-t1", f"-c{_CONNECTIONS}", f"-d{_SECONDS}s", "-s", str(script), url]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = (line.split() for line in said.splitlines() if line.startswith("DONE"))
    if line[3] != "0":
        raise RuntimeError(f"{line[3]} answers were errors:\n{said}")
    return {"nbytes": int(line[1]), "seconds": int(line[2]) / 1e6}
