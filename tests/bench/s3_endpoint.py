"""Resident weights through the S3 endpoint, by the streamer that engines use, beside the store that they came from."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.bench.checkpoints import language_model, primer
from tests.bench.contender import contend
from tests.bench.machine import require
from tests.bench.measure import Row, Sample, Section, gigabytes_per_second, interleave
from tests.bench.session import Session
from tests.servers import Daemon, Missing, SeaweedFS, free_ports, s3_env, until

MAX_SIZE = 1 << 30
_PART = 8 << 20
_THREADS = ("2", "4", "8", "16")


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


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _with_cpu(daemon: Daemon, run: Callable[[], Sample]) -> Sample:
    pid = daemon.pid
    before = _cpu_seconds(pid)
    sample = run()
    return {**sample, "daemon_cpu_seconds": _cpu_seconds(pid) - before}


def run(session: Session) -> Section:
    """Measure; servers, objects and checkpoint are made here and removed by the session."""
    size = min(session.size, MAX_SIZE)
    section = Section("s3face", f"S3 endpoint → the streamer's library, {size / 2**30:.2f} GiB in 8 objects, resident")
    shared = Path("/dev/shm") / f"weightd-bench-{os.getpid()}"
    require(session.folder, disk=2 * size + (2 << 30), memory=4 * size + (1 << 30))
    session.progress("making the checkpoint")
    folder = shared / "models" / "bench"
    try:
        files = language_model(folder, size)
        primer(folder)
        sizes = [path.stat().st_size for path in files]
        try:
            server = SeaweedFS(session.folder / "s3")
        except Missing as missing:
            section.notes.append(f"not measured: {missing}")
            return section
        (port,) = free_ports(1)
        with server, nginx(session.folder / "nginx", shared) as limit:
            session.progress("uploading")
            prefix = server.upload(folder, "bench")
            uris, small = [f"{prefix}/{path.name}" for path in files], f"{prefix}/primer.safetensors"
            environment = {**server.env, "WEIGHTD_S3_LISTEN": f"127.0.0.1:{port}"}
            with session.daemon("s3face", int(1.5 * size) + (64 << 20), environment) as daemon:
                daemon.stage(prefix, device="cpu")

                def read(url: str, threads: str) -> Callable[[], Sample]:
                    return partial(
                        contend, "from_s3:library", primer=small, uris=uris, sizes=sizes, part=_PART, in_flight=1 << 40,
                        environment={**s3_env(url), "RUNAI_STREAMER_OBJ_CONCURRENCY": threads},
                    )  # fmt: skip

                contenders: dict[str, Callable[[], Sample]] = {}
                for name, url in (("nginx", limit), ("store", server.url), ("endpoint", f"http://127.0.0.1:{port}")):
                    if url is None:
                        section.notes.append("the limit is not measured: nginx is not installed")
                        continue
                    choices = {threads: read(url, threads) for threads in _THREADS}
                    best, section.samples[f"calibration of {name}"] = session.calibrate(name, choices)
                    contenders[name] = choices[best]
                ours_alone = contenders["endpoint"]
                contenders["endpoint"] = lambda: _with_cpu(daemon, ours_alone)
                samples = interleave(contenders, session.repetitions, session.progress)
    finally:
        shutil.rmtree(shared, ignore_errors=True)
    section.samples["repetitions"] = samples
    store = Row("SeaweedFS, where they came from", "GB/s", gigabytes_per_second(samples["store"]))
    ours = Row("weightd's S3 endpoint", "GB/s", gigabytes_per_second(samples["endpoint"]))
    ours.at_least(3.0, store)
    rows = [store, ours]
    if "nginx" in samples:
        top = Row("nginx, the same files in shared memory", "GB/s", gigabytes_per_second(samples["nginx"]))
        ours.at_least(0.8, top)
        rows.insert(0, top)
    spent = [1e9 * sample["daemon_cpu_seconds"] / sample["nbytes"] for sample in samples["endpoint"]]
    section.rows += [*rows, Row("processor time of the daemon", "s/GB", spent)]
    return section
